"""Components, thin borders and watersheds of small pictures."""

from __future__ import annotations

import numpy as np
import pytest

from models.membranes.segmentation import components, thinned, watershed

pytest.importorskip("skimage", reason="pip install scikit-image")


def picture(*rows):
    """bool, True where there is a hash."""
    return np.array([[letter == "#" for letter in row] for row in rows])


def dumbbell(gap):
    """Two discs of radius 10 in a picture of 40 × 60, whose membrane has a hole of ``gap`` pixels, up and down."""
    down, across = np.mgrid[:40, :60]
    discs = sum((down - 20) ** 2 + (across - middle) ** 2 <= 100 for middle in (17, 42)) > 0
    discs[20 : 20 + gap, 17:42] = True
    return discs


def test_components_are_4_connected_and_numbered_in_each_section():
    stack = np.stack([picture("##.", "..#", "..#"), picture("...", "...", "#.."), picture("...", "...", "...")])
    labels = components(stack)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels[0], [[1, 1, 0], [0, 0, 2], [0, 0, 2]])
    np.testing.assert_array_equal(labels[1], [[0, 0, 0], [0, 0, 0], [1, 0, 0]])
    assert not labels[2].any()
    np.testing.assert_array_equal(components(stack[0]), labels[0])


def test_borders_are_thinned_to_a_pixel_in_their_middle():
    inside = picture("##.....##", "##.....##", "##.....##")
    np.testing.assert_array_equal(thinned(inside), [[1, 1, 1, 1, 0, 2, 2, 2, 2]] * 3)


def test_thinning_keeps_every_component_and_parts_them():
    inside = np.random.default_rng(0).random((2, 60, 50)) > 0.6
    labels, grown = components(inside), thinned(inside)
    np.testing.assert_array_equal(grown[inside], labels[inside])
    for one, other in ((grown[:, 1:], grown[:, :-1]), (grown[:, :, 1:], grown[:, :, :-1])):
        assert not ((one != other) & (one > 0) & (other > 0)).any()
    # Borders are as thin as they can be: but for corners, their pixels have two segments beside them.
    padded = np.pad(grown, ((0, 0), (1, 1), (1, 1)))
    beside = np.stack([padded[:, 1:-1, 2:], padded[:, 1:-1, :-2], padded[:, 2:, 1:-1], padded[:, :-2, 1:-1]])
    beside.sort(axis=0)
    between = ((beside[1:] != beside[:-1]) & (beside[:-1] > 0)).any(0)
    assert between[grown == 0].mean() > 0.95


def test_thinning_of_one_segment_or_of_none_fills_the_section():
    for inside in (picture("....", "...."), picture("#...", "....")):
        np.testing.assert_array_equal(thinned(inside), np.ones((2, 4)))


def test_watershed_divides_cells_that_touch_in_a_gap():
    inside = dumbbell(gap=3)
    assert components(inside).max() == 1
    probabilities = np.where(inside, 0.9, 0.1)
    labels = watershed(np.stack([probabilities, probabilities.T[:40, :40].repeat(2, 1)[:, :60]]))
    assert labels.dtype == np.int32 and labels.min() == 1 and labels[0].max() == 2
    assert (labels[0, :, :27] == labels[0, 20, 17]).all() and (labels[0, :, 33:] == labels[0, 20, 42]).all()
    # The basins are not deep enough to divide what is as wide as they are.
    assert watershed(np.where(dumbbell(gap=9), 0.9, 0.1)).max() == 1


def test_watershed_borders_lie_where_membranes_are_surest():
    probabilities = np.full((20, 41), 0.9)
    probabilities[:, 15:25] = 0.4
    probabilities[:, 22] = 0.1
    labels = watershed(probabilities)
    assert (labels[:, :22] == labels[0, 0]).all() and (labels[:, 23:] == labels[0, -1]).all()


def test_watershed_keeps_thin_cells_but_no_specks():
    inside = np.zeros((30, 30), bool)
    inside[5:7, 2:28] = True  # two pixels thick
    inside[20, 20] = True
    inside[28:, :] = True  # cut off by the edge of the picture
    labels = watershed(inside.astype(np.float32))
    assert labels.max() == 2 and labels[5, 5] != labels[29, 5]
    assert watershed(inside.astype(np.float32), smallest=1).max() == 3


def test_watershed_takes_cells_cut_off_by_the_edge_as_thick():
    inside = np.zeros((30, 30), bool)
    inside[27:, :] = True
    assert watershed(inside.astype(np.float32), depth=3, smallest=1000).max() == 1
    assert watershed(inside.astype(np.float32), depth=3.5, smallest=1000).max() == 0


def test_watershed_of_borders_alone_has_no_cells():
    assert not watershed(np.zeros((9, 9), np.float32)).any()


def test_other_input_is_refused():
    with pytest.raises(TypeError, match="expected bool, True inside a cell, got uint8"):
        components(np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match="expected a section"):
        components(np.zeros(4, bool))
    with pytest.raises(TypeError, match="expected probabilities of float, got uint8"):
        watershed(np.zeros((4, 4), np.uint8))
    for wrong in (2.0, -0.1, np.nan):
        with pytest.raises(ValueError, match="probabilities from 0 to 1"):
            watershed(np.full((4, 4), wrong))
    with pytest.raises(ValueError, match=r"a threshold must be from 0 to 1, got 1\.5"):
        watershed(np.zeros((4, 4)), 1.5)
    assert components(np.zeros((0, 4, 4), bool)).shape == (0, 4, 4)
