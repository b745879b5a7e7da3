"""Pictures of segmentations: colours of neighbours, cells in the colours of their errors, curves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gpukern import tables
from models.membranes import pictures, results
from models.membranes.colours import PALETTE, coloured
from models.membranes.metrics import evaluate
from models.membranes.segmentation import components
from tests.models.membranes import synthetic


@pytest.fixture(scope="module")
def volume():
    return synthetic.volume(sections=2)


def test_neighbours_have_different_colours():
    cells = components(synthetic.volume(sections=1, cells=40).labels)[0]
    colours = coloured(cells)
    assert (colours[cells == 0] == 0).all()
    for label in range(1, cells.max() + 1):
        (colour,) = np.unique(colours[cells == label], axis=0)
        assert (colour == PALETTE).all(1).any()
        rows, columns = np.nonzero(cells == label)
        # Six pixels to the right or below begins the next cell, where there is one.
        for down, across in ((0, 6), (6, 0)):
            ahead = np.clip(rows + down, 0, 95), np.clip(columns + across, 0, 111)
            others = (cells[ahead] > 0) & (cells[ahead] != label)
            assert (colours[ahead][others] != colour).any(1).all()


def test_colours_of_no_cell_and_of_more_cells_than_colours():
    assert (coloured(np.zeros((4, 5), np.int32)) == 0).all()
    labels = np.arange(1, 101, dtype=np.int32).reshape(10, 10)
    assert len(np.unique(coloured(labels).reshape(-1, 3), axis=0)) == len(PALETTE)


def panel(figure, row, column):
    """The picture that is drawn there."""
    return np.asarray(figure.axes[row * 5 + column].get_images()[0].get_array())


def test_merged_and_split_cells_are_drawn_in_their_colours(volume):
    truth = volume.labels
    found = truth.astype(np.float32)
    cells = components(truth)[0]
    sizes = np.bincount(cells.ravel())
    sizes[0] = 0
    largest = int(sizes.argmax())
    rows, columns = np.nonzero(cells == largest)
    found[0, int(np.median(rows)), columns.min() - 4 : columns.max() + 5] = 0  # a membrane through the largest cell
    figure = pictures.plot_sections(None, volume, found, 0.5, "a title", rows=2)
    assert len(figure.axes) == 10 and figure.get_suptitle().strip() == "a title"
    right, wrong = panel(figure, 1, 4), panel(figure, 0, 4)
    assert np.ptp(right, axis=2).max() < 1e-6, "a section without errors is grey"
    inside = wrong[cells == largest]
    assert (inside[:, 2] > inside[:, 0] + 0.2).all(), "a split cell is blue"
    assert np.ptp(wrong[(cells > 0) & (cells != largest)], axis=1).max() < 1e-6
    merged = truth.astype(np.float32)
    merged[0] = 1  # no membrane: one segment
    reds = panel(pictures.plot_sections(None, volume, merged, 0.5, "", rows=1), 0, 4)[cells == largest]
    assert (reds[:, 0] > reds[:, 2] + 0.2).all(), "a merged cell is red"


def test_labels_alone_are_drawn_without_sections(volume):
    found = volume.labels.astype(np.float32)
    figure = pictures.plot_sections(None, volume, found, 0.5, "", rows=1, with_images=False)
    assert [axes.get_title() for axes in figure.axes] == ["truth", "probability of a cell", "segmentation", "errors"]
    np.testing.assert_array_equal(figure.axes[0].get_images()[0].get_array(), volume.labels[0])
    assert figure.axes[3].get_xlabel() == "precision 1.000, recall 1.000"


def test_a_section_without_cells_is_drawn(volume):
    empty = dataclasses.replace(volume, labels=np.zeros_like(volume.labels))
    figure = pictures.plot_sections(None, empty, volume.labels.astype(np.float32), 0.5, "", rows=1)
    assert figure.axes[3].get_xlabel() == ""


def test_curves_show_every_evaluation_and_threshold(volume, tmp_path):
    found = np.clip(volume.normalized(), 0, 1)
    scores = evaluate(found, volume.labels, (0.3, 0.5, 0.7), progress=False)
    history = [{"step": step, "v_rand": 0.1 * step, "v_rand_unthinned": 0.05 * step} for step in (2, 4)]
    figure = pictures.plot_curves(tmp_path / "curves.png", [1.0, 0.9, 0.8, 0.7], history, {"here": scores}, "a title")
    losses, learning, thresholds = figure.axes
    assert list(losses.lines[0].get_ydata()) == [1.0, 0.9, 0.8, 0.7]
    assert list(learning.lines[0].get_ydata()) == [0.2, 0.4]
    assert list(thresholds.lines[0].get_ydata()) == [point.rand.f for point in scores.thinned.points]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(pictures.plot_curves(None, (), (), {"here": scores}, "").axes) == 1


def test_the_table_names_scores_and_thresholds(volume):
    scores = evaluate(volume.labels.astype(np.float32), volume.labels, (0.5,), progress=False)
    text = tables.as_text(results.table("a title", {"here": scores}))
    assert "a title" in text
    thin, plain = (line.split() for line in text.splitlines() if " thinned " in line or " as found " in line)
    best = scores.thinned.rand.rand
    assert thin[:6] == ["here", "thinned", *(f"{x:.4f}" for x in (best.f, best.precision, best.recall)), "0.50"]
    assert plain == ["as", "found", "1.0000", "1.0000", "1.0000", "0.50", "1.0000", "0.0000"]
