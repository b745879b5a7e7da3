"""Scores of hand-made labelings, their values computed by hand; and of others by scikit-image."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from models.membranes import metrics
from models.membranes.segmentation import components

skimage_metrics = pytest.importorskip("skimage.metrics", reason="pip install scikit-image")

#: Two cells of four pixels with border between and around them.
TWO = np.array([[0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 2, 2, 0], [0, 1, 1, 0, 2, 2, 0]])
#: Four cells of two pixels.
FOUR = np.array([[1, 1, 0, 2, 2], [0, 0, 0, 0, 0], [3, 3, 0, 4, 4]])


def relabelled(labels, **new):
    """``labels`` with numbers exchanged: ``_1=2`` makes 1 a 2."""
    result = labels.copy()
    for old, number in new.items():
        result[labels == int(old[1:])] = number
    return result


def split_in_two(labels):
    """The second row of cell 1 becomes cell 9."""
    result = labels.copy()
    result[2][labels[2] == 1] = 9
    return result


def bitten(labels):
    """One pixel of each of the two cells becomes border."""
    result = labels.copy()
    result[1, 1] = result[1, 4] = 0
    return result


#: name → proposal, truth, (F, precision, recall) of V-Rand, the same of V-Info.
CASES = {
    "perfect": (TWO, TWO, (1, 1, 1), (1, 1, 1)),
    # Names do not matter, nor what the proposal does where the truth has border.
    "renamed": (relabelled(TWO, _0=7, _1=40, _2=5), TWO, (1, 1, 1), (1, 1, 1)),
    # Σp² = 4² + 4² = 32, Σs² = 8² = 64, Σt² = 32: F = 2·32 / 96. H(S) = 0, so that I = 0.
    "all merged": (np.ones_like(TWO), TWO, (2 / 3, 1 / 2, 1), (0, 0, 1)),
    # Σp² = 4·2² = 16, Σs² = 4² + 2² + 2² = 24, Σt² = 16. In bits: H(S) = 1.5 = I, H(T) = 2.
    "two of four merged": (relabelled(FOUR, _2=1), FOUR, (4 / 5, 2 / 3, 1), (6 / 7, 3 / 4, 1)),
    # Σp² = Σs² = 2² + 2² + 4² = 24, Σt² = 32. In bits: H(S) = 1.5, H(T) = 1 = I.
    "one split": (split_in_two(TWO), TWO, (6 / 7, 1, 3 / 4), (4 / 5, 1, 2 / 3)),
    # Two pixels on their own: Σp² = Σs² = 3² + 3² + 1 + 1 = 20, Σt² = 32.
    # In bits: H(S) = 2·(3/8)·log2(8/3) + 2·(1/8)·3, H(T) = 1 = I.
    "border in cells": (
        *(bitten(TWO), TWO, (10 / 13, 1, 5 / 8)),
        (2 / (1.75 + 0.75 * math.log2(8 / 3)), 1, 1 / (0.75 + 0.75 * math.log2(8 / 3))),
    ),
    # Eight pixels on their own: Σp² = Σs² = 8, Σt² = 32. In bits: H(S) = 3, H(T) = 1 = I.
    "nothing proposed": (np.zeros_like(TWO), TWO, (2 / 5, 1, 1 / 4), (1 / 2, 1, 1 / 3)),
    # Of one cell there is nothing to know: 0 / 0 is 1.
    "one cell": (relabelled(TWO, _2=0), relabelled(TWO, _2=0), (1, 1, 1), (1, 1, 1)),
    # Σp² = Σs² = 2² + 2² = 8, Σt² = 16. H(T) = 0 = I.
    "one cell split": (split_in_two(TWO), relabelled(TWO, _2=0), (2 / 3, 1, 1 / 2), (0, 1, 0)),
}


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_computed_by_hand(name):
    proposal, truth, rand, info = CASES[name]
    for score, wanted in ((metrics.rand_score, rand), (metrics.information_score, info)):
        found = score(proposal, truth)
        assert (found.f, found.precision, found.recall) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("score", [metrics.rand_score, metrics.information_score])
def test_sections_weigh_the_same_and_those_without_cells_nothing(score):
    merged = score(relabelled(TWO, _2=1), TWO)
    stack = score(np.stack([TWO, relabelled(TWO, _2=1), TWO]), np.stack([TWO, TWO, np.zeros_like(TWO)]))
    assert stack.f == pytest.approx((1 + merged.f) / 2) and stack.precision == pytest.approx((1 + merged.precision) / 2)
    with pytest.raises(ValueError, match="no pixel inside a cell"):
        score(TWO, np.zeros_like(TWO))


def test_scores_are_scikit_images_where_nothing_is_proposed_as_border():
    random = np.random.default_rng(0)
    truth, proposal = random.integers(0, 9, (50, 60)), random.integers(1, 6, (50, 60))
    proposal[:25][truth[:25] > 0] = truth[:25][truth[:25] > 0]
    rand, info = metrics.rand_score(proposal, truth), metrics.information_score(proposal, truth)
    # It counts pairs of two different pixels, and calls precision what is of the truth, recall what is of the proposal.
    error, of_truth, of_proposal = skimage_metrics.adapted_rand_error(truth, proposal, ignore_labels=(0,))
    sizes = np.bincount(truth[truth > 0])
    n, t = sizes.sum(), (sizes**2).sum()
    p = rand.recall * t
    s = p / rand.precision
    assert ((p - n) / (s - n), (p - n) / (t - n)) == pytest.approx((of_proposal, of_truth))
    assert 2 * (p - n) / (s + t - 2 * n) == pytest.approx(1 - error) and rand.f == pytest.approx(2 * p / (s + t))
    # H(S | T) and H(T | S) in bits; I = H(T) − H(T | S).
    too_many, too_few = skimage_metrics.variation_of_information(truth, proposal, ignore_labels=(0,))
    shares = sizes[1:] / n
    entropy = -(shares * np.log2(shares)).sum()
    mutual = entropy - too_few
    wanted = 2 * mutual / (2 * mutual + too_many + too_few), mutual / entropy, mutual / (mutual + too_many)
    assert (info.f, info.precision, info.recall) == pytest.approx(wanted)


def test_pixel_error_is_the_share_that_differs():
    truth = TWO > 0
    assert metrics.pixel_error(truth, truth) == 0
    assert metrics.pixel_error(bitten(TWO) > 0, truth) == 2 / 21
    with pytest.raises(TypeError, match="expected bool"):
        metrics.pixel_error(TWO, truth)


def test_evaluation_finds_the_best_thresholds():
    # The membranes are at 0.15; a hole in the one between the cells at 0.35.
    probabilities = np.where(np.stack([TWO, TWO]) > 0, 0.85, 0.15)
    probabilities[1, 1, 3] = 0.35
    found = metrics.evaluate(probabilities, np.stack([TWO, TWO]) > 0)
    assert [point.threshold for point in found.plain.points] == list(metrics.THRESHOLDS)
    # Above 0.3 all is right; above 0.1 all cells are one; above 0.2, in the second section; above 0.9 there is nothing.
    merged, nothing = 2 / 3, 2 / 5
    assert [point.rand.f for point in found.plain.points] == pytest.approx(
        [merged] * 2 + [(1 + merged) / 2] * 2 + [1] * 5 + [nothing] * 2
    )
    assert [point.rand.f for point in found.thinned.points] == pytest.approx(
        [merged] * 2 + [(1 + merged) / 2] * 2 + [1] * 5 + [merged] * 2
    )
    assert found.best is found.thinned.rand and found.best.threshold == 0.4
    assert found.plain.info.threshold == 0.4 and found.plain.info.info.f == 1
    assert found.plain.pixel_error.threshold == 0.4 and found.plain.pixel_error.pixel_error == 0
    assert found.plain.points[0].pixel_error == pytest.approx(1 - 8 / 21)


def test_what_is_at_the_threshold_is_border():
    truth = TWO > 0
    found = metrics.evaluate(np.where(truth, 0.75, 0.5), truth, [0.5], thin=False)
    assert found.best.rand.f == 1 and found.best.pixel_error == 0


def test_each_score_has_its_own_best_threshold():
    low, high = metrics.Score(0.2, 1, 0.1), metrics.Score(0.8, 0.7, 0.9)
    points = [(0.1, high, low, 0.5), (0.2, low, high, 0.4), (0.3, low, low, 0.3), (0.4, high, high, 0.6)]
    curve = metrics.Curve(tuple(metrics.AtThreshold(*point) for point in points))
    assert (curve.rand.threshold, curve.info.threshold, curve.pixel_error.threshold) == (0.1, 0.2, 0.3)


def test_an_evaluation_is_told_as_json():
    truth = TWO > 0
    found = metrics.evaluate(truth.astype(np.float32), truth, [0.5], thin=False)
    assert found.thinned is None and found.best is found.plain.points[0]
    told = json.loads(json.dumps(found.to_dict()))
    perfect = {"f": 1.0, "precision": 1.0, "recall": 1.0}
    point = {"threshold": 0.5, "rand": perfect, "info": perfect, "pixel_error": 0.0}
    assert told == {"plain": {"best": dict.fromkeys(("rand", "info", "pixel_error"), point), "points": [point]}}


def test_thick_borders_cost_little_after_thinning():
    cells = np.ones((60, 60), bool)
    cells[:, ::20] = cells[::20] = False
    wide = [np.roll(~cells, (down, across), (0, 1)) for down in range(-2, 3) for across in range(-2, 3)]
    thick = ~np.any(wide, axis=0)
    found = metrics.evaluate(thick.astype(np.float32), cells, [0.5])
    assert components(thick).max() == components(cells).max() == 9
    assert found.plain.rand.rand.f < 0.7
    assert found.thinned.rand.rand.f > 0.85


@pytest.mark.parametrize(
    ("probabilities", "truth", "thresholds", "error", "words"),
    [
        (np.zeros((2, 4, 4)), np.ones((2, 4, 5), bool), [0.5], ValueError, "of one shape, got"),
        (np.zeros(4), np.ones(4, bool), [0.5], ValueError, "of one shape, got"),
        (np.full((2, 4, 4), 1.5), np.ones((2, 4, 4), bool), [0.5], ValueError, "probabilities from 0 to 1"),
        (np.zeros((2, 4, 4), np.uint8), np.ones((2, 4, 4), bool), [0.5], TypeError, "probabilities of float"),
        (np.zeros((2, 4, 4)), np.ones((2, 4, 4)), [0.5], TypeError, "a truth of bool"),
        (np.zeros((2, 4, 4)), np.ones((2, 4, 4), bool), [1.5], ValueError, "thresholds must be from 0 to 1"),
        (np.zeros((2, 4, 4)), np.ones((2, 4, 4), bool), [], ValueError, "thresholds must be from 0 to 1"),
        (np.zeros((2, 4, 4)), np.zeros((2, 4, 4), bool), [0.5], ValueError, "no pixel inside a cell"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(probabilities, truth, thresholds, error, words):
    with pytest.raises(error, match=words):
        metrics.evaluate(probabilities, truth, thresholds)


@pytest.mark.parametrize("function", [metrics.rand_score, metrics.information_score, metrics.errors])
def test_labels_of_other_kinds_are_refused(function):
    with pytest.raises(TypeError, match=r"labels of integers, got bool: components\(\)"):
        function(TWO > 0, TWO)
    with pytest.raises(ValueError, match="labels from 0, got -2"):
        function(relabelled(TWO, _2=-2), TWO)
    with pytest.raises(ValueError, match="of one shape"):
        function(TWO, TWO[:, 1:])


def test_errors_colour_merged_and_split_cells():
    one, other, third = (slice(0, 10), slice(0, 10)), (slice(0, 10), slice(12, 22)), (slice(12, 22), slice(0, 10))
    truth = np.zeros((24, 24), int)
    for number, cell in enumerate((one, other, third), 1):
        truth[cell] = number
    assert not np.any(metrics.errors(truth, truth))
    merged, split = metrics.errors(relabelled(truth, _2=1), truth)
    np.testing.assert_array_equal(merged, (truth == 1) | (truth == 2))
    assert not split.any()
    halves = truth.copy()
    halves[12:17, :10] = 9
    merged, split = metrics.errors(halves, truth)
    np.testing.assert_array_equal(split, truth == 3)
    assert not merged.any()
    # Numbers mean nothing, however large they are.
    assert metrics.errors(halves + 3_000_000, relabelled(truth, _3=2_000_000))[1].sum() == 100
    # A cell that is missed, in whole or in part, is in neither, nor are those of a stack's other sections.
    part = truth.copy()
    part[12:17] = 0
    assert not np.any(metrics.errors(part, truth))
    missed = np.stack([relabelled(truth, _3=0), relabelled(truth, _2=1), truth])
    merged, split = metrics.errors(missed, np.stack([truth] * 3))
    assert [part.any() for part in merged] == [False, True, False] and not split.any()


@pytest.mark.parametrize("dtype, factor", [(np.uint32, 10**9), (np.int64, 2**60), (np.uint64, 2**61)])
def test_numbers_of_labels_mean_nothing_however_large(dtype, factor):
    rng = np.random.default_rng(0)
    pair = [rng.integers(low, 4, (2, 12, 13)).astype(dtype) for low in (0, 1)]
    large = [labels * dtype(factor) for labels in pair]
    assert metrics.rand_score(*large) == metrics.rand_score(*pair)
    assert metrics.information_score(*large[::-1]) == metrics.information_score(*pair[::-1])
    for some, others in zip(metrics.errors(*large, smallest=1), metrics.errors(*pair, smallest=1), strict=True):
        np.testing.assert_array_equal(some, others)
        assert some.any()


def test_small_overlaps_and_small_cells_are_tolerated():
    truth = np.zeros((12, 24), int)
    truth[1:11, 1:11], truth[1:11, 12:22] = 1, 2
    leak = truth.copy()
    leak[1:6, 12] = 1  # 5 of 100 pixels
    assert not np.any(metrics.errors(leak, truth))
    leak[6, 12] = 1
    merged, split = metrics.errors(leak, truth)
    np.testing.assert_array_equal(split, truth == 2)
    # Cell 2 is not merged: its own segment covers it alone.
    np.testing.assert_array_equal(merged, truth == 1)
    assert not np.any(metrics.errors(leak, truth, tolerance=0.1))
    # A cell of 30 pixels in the segment of one of 100: both are lost, as it makes up a quarter of the segment;
    # in a segment of 1,000 it is a speck, and lost alone.
    for side, lost in ((10, True), (33, False)):
        cells = np.zeros((36, 45), int)
        cells[1 : side + 1, 1 : side + 1], cells[1:7, 36:41] = 1, 2
        merged, _ = metrics.errors((cells > 0).astype(int), cells)
        assert merged[cells == 2].all() and (merged[cells == 1] == lost).all()
    assert not np.any(metrics.errors(np.ones_like(truth), truth, smallest=101))
    assert np.array_equal(metrics.errors(np.ones_like(truth), truth, smallest=100)[0], truth > 0)
