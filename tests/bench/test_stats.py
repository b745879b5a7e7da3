"""Medians, their intervals, ratios by rounds, means of ratios."""

from __future__ import annotations

import math
import random
import statistics
from fractions import Fraction

import numpy as np
import pytest

from bench.stats import geometric_mean, percentile, ratio, spread


def at_most(k: int, n: int) -> Fraction:
    """P(at most k of n samples lie below the median)."""
    return Fraction(sum(math.comb(n, i) for i in range(k + 1)), 2**n)


def test_the_interval_covers_the_median_in_95_of_100_runs_and_is_no_wider_than_that():
    for n in (*range(1, 201), 1500):
        found = spread(range(n))  # the samples are their own ranks
        left_out = found.low
        assert found.high == n - 1 - left_out, n  # symmetric
        if n < 6:  # not even the range is that sure
            assert left_out == 0 and 1 - 2 * at_most(0, n) < Fraction(95, 100), n
        else:
            assert 1 - 2 * at_most(left_out, n) >= Fraction(95, 100), n
            assert 1 - 2 * at_most(left_out + 1, n) < Fraction(95, 100), n


def test_the_interval_covers_a_skewed_median_as_often_as_it_says():
    """By trial: exponential times, whose median is ln 2."""
    draw, hits = random.Random(1), 0
    for _ in range(4000):
        found = spread([draw.expovariate(1) for _ in range(20)])
        hits += found.low <= math.log(2) <= found.high
    # Exactly 1 − 2·P(at most 5 of 20) = 95.9 %; three standard deviations of 4000 trials are 0.9 %.
    assert abs(hits / 4000 - float(1 - 2 * at_most(5, 20))) < 0.0095


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 21, 100])
def test_median_of_samples_in_any_order(n):
    draw = random.Random(n)
    samples = [draw.lognormvariate(0, 1) for _ in range(n)]
    found = spread(samples)
    assert math.isclose(found.median, np.median(samples), rel_tol=1e-12)
    assert found.low <= found.median <= found.high
    assert spread(sorted(samples)) == spread(samples[::-1]) == found


def test_drift_that_hits_both_cancels():
    ours, theirs = [10.0, 11.0, 9.0, 10.0, 10.5, 9.5, 10.0], [20.0, 22.0, 18.0, 20.0, 21.0, 19.0, 20.0]
    clocks = [1.0, 1.3, 2.0, 0.7, 1.1, 5.0, 1.0]
    found = ratio(
        [a * c for a, c in zip(ours, clocks, strict=True)], [b * c for b, c in zip(theirs, clocks, strict=True)]
    )
    assert found.median == found.low == found.high == pytest.approx(2.0)
    # Above 1 we are faster; it is the median of ratios, not the ratio of medians.
    assert ratio([1.0, 2.0, 4.0], [2.0, 2.0, 2.0]).median == 1.0
    assert ratio([1.0, 10.0, 100.0], [3.0, 20.0, 100.0]).median == 2.0


def test_the_geometric_mean_does_not_depend_on_the_base():
    ratios = [0.5, 2.0, 1.7, 0.9, 4.0]
    assert geometric_mean(ratios) == pytest.approx(math.exp(statistics.fmean(map(math.log, ratios))))
    assert geometric_mean(1 / r for r in ratios) == pytest.approx(1 / geometric_mean(ratios))
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "wrong", [lambda: spread([]), lambda: ratio([], []), lambda: ratio([1.0, 2.0], [1.0]), lambda: geometric_mean([])]
)
def test_nothing_is_made_of_nothing_or_of_unequal_rounds(wrong):
    with pytest.raises(ValueError):
        wrong()


def test_a_percentile_is_one_of_the_samples():
    samples = [float(n) for n in range(100, 0, -1)]
    assert [percentile(samples, share) for share in (0.0, 0.01, 0.5, 0.99, 1.0)] == [1.0, 1.0, 50.0, 99.0, 100.0]
    # Of few the largest: nobody knows better.
    assert percentile([3.0, 1.0, 2.0], 0.99) == 3.0
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 0.5)
