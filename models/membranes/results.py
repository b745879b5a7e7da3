"""The scores of segmentations, one beside the other."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from rich.table import Table

from gpukern import tables
from models.membranes.metrics import Evaluation, evaluate
from models.membranes.volumes import Volume

#: Standard deviation of the Gaussian, in pixels, that smooths the images of :func:`baseline`.
SMOOTHING = 2.0
#: Thresholds of final scores: every twentieth.
THRESHOLDS = tuple(step / 20 for step in range(21))
#: The row of the images themselves.
RAW = "smoothed image"


def score(probabilities: np.ndarray, truth: np.ndarray) -> Evaluation:
    """At all of :data:`THRESHOLDS`, thinned and not."""
    return evaluate(probabilities, truth, THRESHOLDS)


def baseline(volume: Volume) -> Evaluation:
    """What a threshold of the smoothed sections alone gives: cells are brighter than membranes."""
    from scipy import ndimage

    assert volume.labels is not None
    smoothed = ndimage.gaussian_filter(volume.normalized(), (0, SMOOTHING, SMOOTHING))
    return score(np.clip(smoothed, 0, 1), volume.labels)


def table(title: str, evaluations: Mapping[str, Evaluation]) -> Table:
    """Rows of scores of what the keys name, each score at the threshold that suits it best.

    The thresholds that are shown are those of V-Rand. "merges" is its precision, which merged cells lower, "splits" its
    recall, which split ones lower.
    """
    columns = ("V-Rand, thinned", "merges", "splits", "threshold", "V-Info, thinned")
    made = tables.table("", *tables.numbers(*columns, "V-Rand", "V-Info", "threshold", "pixel error"), title=title)
    for name, scores in evaluations.items():
        thinned, plain = scores.thinned or scores.plain, scores.plain
        rand, best = thinned.rand.rand, plain.rand
        made.add_row(
            name,
            *map(_number, (rand.f, rand.precision, rand.recall)),
            f"{thinned.rand.threshold:.2f}",
            *map(_number, (thinned.info.info.f, best.rand.f, plain.info.info.f)),
            f"{best.threshold:.2f}",
            _number(plain.pixel_error.pixel_error),
        )
    return made


def _number(value: float) -> str:
    return f"{value:.4f}"
