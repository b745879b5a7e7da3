"""U-Net's weights against every distance of every pixel, computed one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from models.membranes.segmentation import components
from models.membranes.weights import border_weights

pytest.importorskip("scipy", reason="pip install scipy")


def distances(cells):
    """[cells, H, W]: from each pixel to the nearest one of each cell."""
    pixels = np.stack(np.indices(cells.shape), -1)
    found = []
    for number in range(1, cells.max() + 1):
        of_cell = np.argwhere(cells == number)
        found.append(np.sqrt(((pixels[:, :, None] - of_cell) ** 2).sum(-1)).min(-1))
    return np.array(found)


@pytest.mark.parametrize(("sigma", "sparse"), [(0.8, 0.8), (2.0, 0.98), (5.0, 0.8)])
def test_weights_are_those_of_all_distances(sigma, sparse):
    random = np.random.default_rng(int(sigma))
    labels = random.random((3, 23, 31)) > sparse
    found = border_weights(labels, 7.0, sigma, balance=False)
    assert found.dtype == np.float32 and found.shape == labels.shape
    emphasized = 0
    for section, weights in zip(labels, found, strict=True):
        first, second = np.sort(distances(components(section)), axis=0)[:2]
        wanted = 1 + 7 * np.exp(-((first + second) ** 2) / (2 * sigma**2))
        wanted[section | (second > 4 * sigma)] = 1
        np.testing.assert_allclose(weights, wanted, rtol=1e-6)
        emphasized += (weights > 1).sum()
    assert emphasized > 100


def test_the_middle_of_a_membrane_weighs_most_where_it_is_thin():
    labels = np.ones((1, 9, 40), bool)
    labels[0, :, 8:11] = labels[0, :, 28:33] = False
    weights = border_weights(labels, balance=False)[0, 4]
    # Of 3 and 5 pixels of membrane the middle ones are 2 and 3 pixels from both cells, the others 4 and 6 in all too.
    assert weights[9] == pytest.approx(1 + 10 * math.exp(-16 / 50))
    assert weights[30] == pytest.approx(1 + 10 * math.exp(-36 / 50))
    assert set(np.flatnonzero(weights > 1)) == {8, 9, 10, 28, 29, 30, 31, 32}


def test_both_classes_count_as_much():
    labels = np.random.default_rng(0).random((4, 30, 30)) > 0.2
    weights = border_weights(labels, w0=0)
    assert weights[labels].sum() == pytest.approx(weights[~labels].sum(), rel=1e-5)
    assert weights.mean() == pytest.approx(1, rel=1e-5)
    # The border's part comes on top.
    more = border_weights(labels)
    np.testing.assert_allclose(more - weights, border_weights(labels, balance=False) - 1, atol=1e-5)


def test_there_is_no_border_of_one_cell_nor_balance_of_one_class():
    labels = np.zeros((2, 12, 12), bool)
    labels[0, 3:5, 3:5] = labels[1, 8:, 8:] = True
    assert (border_weights(labels, balance=False) == 1).all()
    for one in (np.ones((1, 4, 4), bool), np.zeros((1, 4, 4), bool)):
        assert (border_weights(one) == 1).all()
    assert border_weights(labels[0]).shape == (12, 12)


@pytest.mark.parametrize(
    ("labels", "options", "error", "words"),
    [
        (np.zeros((4, 4), np.uint8), {}, TypeError, "labels of bool"),
        (np.zeros(4, bool), {}, ValueError, "expected labels"),
        (np.zeros((4, 4), bool), {"sigma": 0}, ValueError, "sigma above 0, got 10.0 and 0"),
        (np.zeros((4, 4), bool), {"w0": -1}, ValueError, "w0 must be at least 0"),
        (np.zeros((4, 4), bool), {"w0": math.nan}, ValueError, "w0 must be at least 0"),
    ],
)
def test_other_input_is_refused(labels, options, error, words):
    with pytest.raises(error, match=words):
        border_weights(labels, **options)
