"""Estimators of the magnitude that becomes the format's largest number, from a histogram of magnitudes.

What is larger is clamped; the smaller the threshold, the finer the steps below it.
"""

from __future__ import annotations

import torch

from gpukern.fusion.quantization.formats import Format, rounded_to, scale_for
from gpukern.fusion.quantization.histogram import BINS, Histogram

#: The share of magnitudes below the threshold of "percentile".
_SHARE = 0.9999
#: Thresholds tried, as shares of the largest magnitude.
_TRIED = torch.linspace(0.2, 1.0, 81, dtype=torch.float64)
#: Bins below which no threshold of "entropy" lies, and how many lie between two of them.
_FEWEST, _STEP = 128, 16


def threshold(histogram: Histogram, estimator: str, format: Format) -> float:
    """The threshold by "max", "percentile", "mse" or "entropy"; 0 where all was zero."""
    if not histogram.largest:
        return 0.0
    return min(_ESTIMATORS[estimator](histogram, format), histogram.largest)


def _max(histogram: Histogram, format: Format) -> float:
    return histogram.largest


def _percentile(histogram: Histogram, format: Format) -> float:
    below = histogram.counts.cumsum(0) / histogram.counts.sum()
    return (int((below < _SHARE).sum()) + 1) * histogram.width


def _mse(histogram: Histogram, format: Format) -> float:
    """The threshold with the least mean-squared error of the magnitudes."""
    centers, counts = histogram.centers, histogram.counts
    used = counts > 0
    centers, counts = centers[used], counts[used]
    tried = _TRIED * histogram.largest
    errors = [
        ((rounded_to(centers, scale_for(each, format), format) - centers).square() * counts).sum()
        for each in tried.tolist()
    ]
    return tried[int(torch.stack(errors).argmin())].item()


def _entropy(histogram: Histogram, format: Format) -> float:
    """The threshold whose distribution, in the format's steps, has the least Kullback-Leibler divergence.

    What is clamped counts in the last bin of the distribution, but not of its image in steps, so that it costs.
    """
    best, found = float("inf"), histogram.largest
    counts = histogram.counts.clone()
    counts[0] = 0  # zeros are exact in every scale
    if not counts.any():
        return found
    for end in range(_FEWEST, BINS + 1, _STEP):
        kept = counts[:end]
        if not kept.any():
            continue
        true = kept.clone()
        true[-1] += counts[end:].sum()
        divergence = _divergence(true, _in_steps(kept, end, format))
        if divergence < best:
            best, found = divergence, end * histogram.width
    return found


def _in_steps(counts: torch.Tensor, end: int, format: Format) -> torch.Tensor:
    """``counts`` spread evenly over the bins, among those that have any, which are one number in the format."""
    centers = torch.arange(end, dtype=torch.float64) + 0.5
    steps = rounded_to(centers, end / format.largest, format)
    _, group = steps.unique_consecutive(return_inverse=True)
    used = (counts > 0).double()
    total = torch.zeros(int(group[-1]) + 1, dtype=torch.float64)
    mass, bins = total.clone().index_add(0, group, counts), total.index_add(0, group, used)
    return used * (mass / bins.clamp(min=1))[group]


def _divergence(true: torch.Tensor, image: torch.Tensor) -> float:
    p, q = true / true.sum(), image / image.sum()
    used = p > 0
    return (p[used] * (p[used] / q[used].clamp(min=1e-12)).log()).sum().item()


_ESTIMATORS = {"max": _max, "percentile": _percentile, "mse": _mse, "entropy": _entropy}
ESTIMATORS = tuple(_ESTIMATORS)
