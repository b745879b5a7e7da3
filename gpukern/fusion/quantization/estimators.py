"""Estimators of the magnitude that becomes the format's largest number, from a histogram of magnitudes.

What is larger is clamped; the smaller the threshold, the finer the steps below it.
"""

from __future__ import annotations

import math

import torch

from gpukern.fusion.quantization.formats import Format, rounded_to, scale_for
from gpukern.fusion.quantization.histogram import BINS, Histogram

#: The share of magnitudes below the threshold of "percentile".
_SHARE = 0.9999
#: Thresholds tried, as shares of the largest magnitude.
_TRIED = torch.linspace(0.2, 1.0, 81, dtype=torch.float64)
#: Bins below which no threshold of "entropy" lies, and how many lie between two of them.
_FEWEST, _STEP = 128, 16
#: Of the mass, what a distribution without any in a bin is taken to have there.
_NOTHING = 1e-12


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
    """The threshold whose distribution, in the format's steps, has the least Kullback-Leibler divergence from the true.

    With c the counts, those beyond the threshold added to the last bin's, of the true distribution, and m̄ the mean
    count of the bins that share a step with one, where there are any:

        D = Σ c/T · log(c/T) − Σ c/T · log(m̄/M),   T = Σ c,   M = Σ m̄

    What is clamped is in the true distribution alone, so that it costs.
    """
    counts = histogram.counts.clone()
    counts[0] = 0  # zeros are exact in every scale
    total = counts.sum().item()
    if not total:
        return histogram.largest
    below, logs = counts.cumsum(0).tolist(), torch.xlogy(counts, counts).cumsum(0).tolist()
    best, found = math.inf, histogram.largest
    for end in range(_FEWEST, BINS + 1, _STEP):
        inside, last = below[end - 1], counts[end - 1].item()
        if not inside:
            continue
        outside = total - inside
        own = logs[end - 1] - _x_log_x(last) + _x_log_x(last + outside)
        mass, bins = _in_steps(counts[:end], end, format)
        mean = mass / bins.clamp(min=1)
        there = mean[-1].item() if last else _NOTHING * inside
        image = torch.xlogy(mass, mean).sum().item() + outside * math.log(there)
        divergence = own / total - math.log(total) - image / total + math.log(inside)
        if divergence < best:
            best, found = divergence, end * histogram.width
    return found


def _x_log_x(x: float) -> float:
    return x * math.log(x) if x else 0.0


def _in_steps(counts: torch.Tensor, end: int, format: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """For each step of the format: the sum of the counts that are rounded to it, and how many of them are not zero."""
    centers = torch.arange(end, dtype=torch.float64) + 0.5
    steps = rounded_to(centers, end / format.largest, format)
    _, group = steps.unique_consecutive(return_inverse=True)
    empty = torch.zeros(int(group[-1]) + 1, dtype=torch.float64)
    return empty.index_add(0, group, counts), empty.index_add(0, group, (counts > 0).double())


_ESTIMATORS = {"max": _max, "percentile": _percentile, "mse": _mse, "entropy": _entropy}
ESTIMATORS = tuple(_ESTIMATORS)
