"""How well a segmentation agrees with the truth: V-Rand, V-Info and the pixel error of the ISBI 2012 challenge.

Arganda-Carreras et al., "Crowdsourcing the creation of image segmentation algorithms for connectomics", Frontiers in
Neuroanatomy 9:142, 2015. Where the article leaves it open, this follows the metrics in Fiji that the challenge names
(``trainableSegmentation.metrics`` of Trainable Weka Segmentation, as "Segmentation evaluation after border thinning"
calls them):

- Segments are 4-connected components of a section; scores are means over sections, each weighing the same. (Fiji pools
  the pixels of all sections in V-Rand without thinning alone; here both are means, so that they can be compared.)
- Pixels that the truth calls border do not count. A pixel that only the proposal calls border is a segment of its own:
  were they one segment, a thick border would merge all cells, and were they left out, it would cost nothing.
- Thinning, watershed lines of the thresholded proposal, makes that rule matter little: the challenge's final scores.
- One threshold is chosen for all sections, the best for each score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from models.membranes.segmentation import checked_probabilities, components, thinned
from models.progress import tracked

#: As the challenge: 0, 0.1, …, 1.
THRESHOLDS = tuple(step / 10 for step in range(11))


@dataclass(frozen=True)
class Score:
    """``f``, the harmonic mean of precision and recall (α = ½); of several sections, the mean of each.

    ``precision`` is lowered by cells that are merged, the article's merge score; ``recall`` by cells that are split,
    its split score.
    """

    f: float
    precision: float
    recall: float


@dataclass(frozen=True)
class AtThreshold:
    """The scores of what is above a threshold."""

    threshold: float
    rand: Score
    info: Score
    pixel_error: float


@dataclass(frozen=True)
class Curve:
    """The scores at each threshold, in their order."""

    points: tuple[AtThreshold, ...]

    @property
    def rand(self) -> AtThreshold:
        """Where V-Rand is highest; of equal ones the first."""
        return max(self.points, key=lambda point: point.rand.f)

    @property
    def info(self) -> AtThreshold:
        """Where V-Info is highest."""
        return max(self.points, key=lambda point: point.info.f)

    @property
    def pixel_error(self) -> AtThreshold:
        """Where the pixel error is lowest."""
        return min(self.points, key=lambda point: point.pixel_error)


@dataclass(frozen=True)
class Evaluation:
    """Scores of the thresholded probabilities as they are, and after thinning (None where that was not asked for)."""

    plain: Curve
    thinned: Curve | None

    @property
    def best(self) -> AtThreshold:
        """The scores at the threshold with the highest V-Rand, after thinning where there is that."""
        return (self.thinned or self.plain).rand

    def to_dict(self) -> dict[str, Any]:
        """For JSON: both curves, and the best threshold of each score."""
        return {name: _told(curve) for name, curve in (("plain", self.plain), ("thinned", self.thinned)) if curve}


def _told(curve: Curve) -> dict[str, Any]:
    best = {name: asdict(getattr(curve, name)) for name in ("rand", "info", "pixel_error")}
    return {"best": best, "points": [asdict(point) for point in curve.points]}


def rand_score(proposal: np.ndarray, truth: np.ndarray) -> Score:
    """V-Rand: F = Σ p² / (½ Σ s² + ½ Σ t²), precision Σ p² / Σ s², recall Σ p² / Σ t², foreground-restricted.

    p are the shares of pixels in a segment of the proposal and one of the truth, s and t those in a segment of the
    proposal, of the truth. Labels are integers [H, W] or [sections, H, W], 0 for border; a number that occurs in two
    sections means nothing.

    Sections whose truth is all border have no pixel to judge and are left out. ValueError where all are so, and for
    different shapes; TypeError for labels that are no integers.
    """
    return _mean([_rand(*counts) for counts in _tables(proposal, truth)])


def information_score(proposal: np.ndarray, truth: np.ndarray) -> Score:
    """V-Info: F = I(S; T) / (½ H(S) + ½ H(T)), precision I / H(T), recall I / H(S), foreground-restricted.

    S and T are the segments that a pixel is in, of the proposal and of the truth; I is their mutual information, H the
    entropy. Of one segment H is 0: what is divided by it is 1, as nothing could be told wrongly. Labels and errors as
    in :func:`rand_score`.
    """
    return _mean([_information(*counts) for counts in _tables(proposal, truth)])


def pixel_error(proposal: np.ndarray, truth: np.ndarray) -> float:
    """The share of pixels of which one says inside and the other border: bool arrays of one shape."""
    if proposal.dtype != bool or truth.dtype != bool:
        raise TypeError(f"expected bool, True inside a cell, got {proposal.dtype} and {truth.dtype}")
    _check_shapes(proposal, truth)
    return float(np.mean(proposal != truth))


def evaluate(
    probabilities: np.ndarray,
    truth: np.ndarray,
    thresholds: Sequence[float] = THRESHOLDS,
    thin: bool = True,
    progress: bool = True,
) -> Evaluation:
    """Score ``probabilities`` of being inside a cell [sections, H, W] against ``truth``, bool of the same shape.

    At each of the thresholds, a pixel is inside where its probability is above it. Thinning takes most of the time,
    about a tenth of a second for a section of 512 × 512 and a threshold. ``progress`` shows a bar on a terminal.

    ValueError for different shapes, probabilities or thresholds that are not from 0 to 1, and a truth without cells;
    TypeError for other dtypes.
    """
    probabilities = checked_probabilities(probabilities)
    if truth.dtype != bool:
        raise TypeError(f"expected a truth of bool, True inside a cell, got {truth.dtype}")
    _check_shapes(probabilities, truth)
    if not len(thresholds) or not all(0 <= threshold <= 1 for threshold in thresholds):
        raise ValueError(f"thresholds must be from 0 to 1, got {list(thresholds)}")
    cells = components(truth)
    plain, thin_ones = [], []
    for threshold in tracked(list(thresholds), "thresholds", progress):
        inside = probabilities > threshold
        wrong = pixel_error(inside, truth)
        plain.append(_at(threshold, components(inside), cells, wrong))
        if thin:
            thin_ones.append(_at(threshold, thinned(inside), cells, wrong))
    return Evaluation(Curve(tuple(plain)), Curve(tuple(thin_ones)) if thin else None)


def _at(threshold: float, proposal: np.ndarray, cells: np.ndarray, wrong: float) -> AtThreshold:
    tables = _tables(proposal, cells)
    rand, info = (_mean([score(*counts) for counts in tables]) for score in (_rand, _information))
    return AtThreshold(float(threshold), rand, info, wrong)


def errors(
    proposal: np.ndarray, truth: np.ndarray, tolerance: float = 0.05, smallest: int = 25
) -> tuple[np.ndarray, np.ndarray]:
    """(merged, split): masks of the truth's cells that the proposal merges with others, and of those that it splits.

    A segment has a part in a cell where it covers more than ``tolerance`` of the cell's pixels. A cell is merged where
    the segment with the largest part in it has parts in others too, which make up more than ``tolerance`` of the
    segment: of a large cell and a speck that became one, the speck alone is lost. A cell is split where several
    segments have a part in it. Cells with fewer pixels than ``smallest`` are not looked at. Labels as in
    :func:`rand_score`; the masks are bool of their shape. A cell can be in both, and one that was missed altogether is
    in neither.
    """
    _check_labels(proposal, truth)
    merged, split = np.zeros(truth.shape, bool), np.zeros(truth.shape, bool)
    for segments, cells, of_merged, of_split in zip(*map(_sections, (proposal, truth, merged, split)), strict=True):
        segments, cells = _renumbered(segments), _renumbered(cells)
        table = _contingency(segments, cells).toarray()
        sizes = table.sum(1)
        table[:, 0] = 0  # border
        parts = (table > tolerance * sizes[:, None]) & (sizes >= max(1, smallest))[:, None]
        largest = table.argmax(1)
        # Of the segment with the largest part in a cell: pixels there, in all cells, and in those it has a part in.
        own, whole, in_parts = (
            table[np.arange(len(table)), largest],
            table.sum(0)[largest],
            (table * parts).sum(0)[largest],
        )
        has_part = parts[np.arange(len(parts)), largest]
        # In place: these are views of a section of the masks.
        of_merged[...] = (has_part & (in_parts - own > tolerance * whole))[cells]
        of_split[...] = (parts.sum(1) > 1)[cells]
    return merged, split


def _check_shapes(proposal: np.ndarray, truth: np.ndarray) -> None:
    if proposal.shape != truth.shape or proposal.ndim not in (2, 3):
        shapes = f"{list(proposal.shape)} and {list(truth.shape)}"
        raise ValueError(f"expected two stacks [sections, H, W] or sections [H, W] of one shape, got {shapes}")


def _check_labels(proposal: np.ndarray, truth: np.ndarray) -> None:
    for labels in (proposal, truth):
        if labels.dtype.kind not in "iu":
            raise TypeError(f"expected labels of integers, got {labels.dtype}: components() makes them of bool")
        if labels.size and labels.min() < 0:
            raise ValueError(f"expected labels from 0, got {labels.min()}")
    _check_shapes(proposal, truth)


def _sections(labels: np.ndarray) -> np.ndarray:
    return labels if labels.ndim == 3 else labels[None]


def _renumbered(labels: np.ndarray) -> np.ndarray:
    """The labels of a section with numbers of its own, 0 for border: a table has a row for each up to the highest."""
    values, places = np.unique(labels, return_inverse=True)
    return places.reshape(labels.shape) + int(labels.size > 0 and values[0] > 0)


def _contingency(segments: np.ndarray, cells: np.ndarray) -> Any:
    """Sparse [cells, segments]: how many pixels are in both; those that the truth calls border left out."""
    from skimage.metrics import contingency_table

    return contingency_table(cells, segments, ignore_labels=[0])


def _tables(proposal: np.ndarray, truth: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each section with cells, the pixels in: a cell and a segment; a segment; a cell. float64, none of them 0."""
    _check_labels(proposal, truth)
    tables = []
    for segments, cells in zip(_sections(proposal), _sections(truth), strict=True):
        if not cells.any():
            continue
        if max(segments.max(), cells.max()) > cells.size:  # it takes time, and those of components() are few
            segments, cells = _renumbered(segments), _renumbered(cells)
        table = _contingency(segments, cells).tocsc()
        alone = np.ones(int(table[:, 0].sum()))  # pixels of the proposal's border, a segment each
        named = table[:, 1:]
        both, of_segments = (np.concatenate([_positive(counts), alone]) for counts in (named.data, named.sum(0)))
        tables.append((both, of_segments, _positive(table.sum(1))))
    if not tables:
        raise ValueError("the truth has no pixel inside a cell")
    return tables


def _positive(counts: np.ndarray) -> np.ndarray:
    counts = np.asarray(counts, np.float64).ravel()
    return counts[counts > 0]


def _rand(both: np.ndarray, segments: np.ndarray, cells: np.ndarray) -> Score:
    p, s, t = ((counts**2).sum() for counts in (both, segments, cells))
    return Score(2 * p / (s + t), p / s, p / t)


def _information(both: np.ndarray, segments: np.ndarray, cells: np.ndarray) -> Score:
    joint, s, t = (_entropy(counts) for counts in (both, segments, cells))
    mutual = max(0.0, s + t - joint)
    return Score(_share(2 * mutual, s + t), _share(mutual, t), _share(mutual, s))


def _entropy(counts: np.ndarray) -> float:
    """In nats."""
    total = counts.sum()
    return math.log(total) - float((counts * np.log(counts)).sum()) / total if len(counts) > 1 else 0.0


def _share(part: float, whole: float) -> float:
    return min(1.0, part / whole) if whole else 1.0


def _mean(scores: list[Score]) -> Score:
    f, precision, recall = (
        float(np.mean([getattr(score, name) for score in scores])) for name in ("f", "precision", "recall")
    )
    return Score(f, precision, recall)
