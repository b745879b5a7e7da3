"""The few statistics of the benchmark: medians, how sure they are, and means of ratios.

Times are skewed (nothing makes a kernel faster by accident, much makes it slower), so nothing here assumes a normal
distribution.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """A median with an interval that holds the true median with 95 % confidence."""

    median: float
    low: float
    high: float


def spread(samples: Sequence[float]) -> Spread:
    """Return the spread of samples of any distribution: ``low`` and ``high`` are order statistics.

    How many of n samples lie below the median is binomial(n, ½); the interval leaves out as many at either end as
    happens with a probability of at most 2.5 %. With fewer than six samples that is none: the interval is their range.
    ValueError without samples.
    """
    if not samples:
        raise ValueError("no samples")
    ordered = sorted(samples)
    n = len(ordered)
    # In whole numbers: 2⁻ⁿ underflows for large n. P(at most k of n lie below the median) = ways / 2ⁿ.
    first, ways = 0, 1 + n
    while 40 * ways <= 2**n:
        first += 1
        ways += math.comb(n, first + 1)
    return Spread(statistics.median(ordered), ordered[first], ordered[n - 1 - first])


def percentile(samples: Sequence[float], share: float) -> float:
    """The least sample that ``share`` of all do not exceed: one of them, not a value between two.

    With fewer than 1 / (1 − share) samples it is the largest. ValueError without samples.
    """
    if not samples:
        raise ValueError("no samples")
    return sorted(samples)[max(math.ceil(share * len(samples)), 1) - 1]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """theirs / ours, round by round: above 1 we are faster. Clock drift, which hits a whole round, cancels.

    ValueError for sequences of different lengths: they were not taken in the same rounds.
    """
    return spread([b / a for a, b in zip(ours, theirs, strict=True)])


def geometric_mean(ratios: Iterable[float]) -> float:
    """exp(mean(log r)), the only mean of ratios that does not depend on which of two is called the base."""
    return statistics.geometric_mean(ratios)
