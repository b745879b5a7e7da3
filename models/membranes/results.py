"""The scores of segmentations, one beside the other."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from rich.table import Table

from gpukern import tables
from models.membranes.metrics import Curve, Evaluation, evaluate
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
    """Scores of what the keys name, with thin borders and as they are, each score at the threshold that suits it best.

    "above" is V-Rand's threshold. Merged cells lower its precision, split ones its recall.
    """
    columns = ("V-Rand", "precision", "recall", "above", "V-Info", "pixel error")
    made = tables.table("", "borders", *tables.numbers(*columns), title=title)
    for name, scores in evaluations.items():
        if scores.thinned:
            made.add_row(name, "thinned", *_scores(scores.thinned), "")
        wrong = _number(scores.plain.pixel_error.pixel_error)
        made.add_row("" if scores.thinned else name, "as found", *_scores(scores.plain), wrong)
    return made


def _scores(curve: Curve) -> list[str]:
    best = curve.rand
    parts = map(_number, (best.rand.f, best.rand.precision, best.rand.recall))
    return [*parts, f"{best.threshold:.2f}", _number(curve.info.info.f)]


def _number(value: float) -> str:
    return f"{value:.4f}"
