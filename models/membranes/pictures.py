"""Pictures of segmentations: sections with what was found in them and what is wrong, and the curves of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpukern.diagnose.curves import trailing_mean
from gpukern.diagnose.extras import needed
from gpukern.diagnose.figures import BLUE, FAINT, GREEN, GREY, ORANGE, panels, style, written
from models.membranes.colours import coloured
from models.membranes.metrics import Evaluation, errors, rand_score
from models.membranes.segmentation import components, thinned
from models.membranes.volumes import Volume

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MERGED, _SPLIT, _FOUND = (0.84, 0.24, 0.16), (0.16, 0.44, 0.86), (0.9, 0.9, 0.9)
_HEADINGS = ("section", "truth", "probability of a cell", "segmentation", "errors")
#: The grey of sections that are not there.
_PLAIN = 0.75
#: Sections in a picture, and steps over which a curve of losses is averaged.
_ROWS, _WINDOW = 3, 50


def plot_sections(
    path: Path | None,
    volume: Volume,
    probabilities: np.ndarray,
    threshold: float,
    title: str,
    rows: int = _ROWS,
    with_images: bool = True,
) -> Any:
    """Draw ``rows`` sections of ``volume``, far apart: truth, ``probabilities``, and what is above ``threshold``.

    Segments, thinned, lie over the section in colours that differ from their neighbours'. Of the truth's cells, those
    that the segmentation merges are red, those that it splits blue, both violet. Not ``with_images``: of labels alone.
    """
    assert volume.labels is not None
    chosen = np.unique(np.linspace(0, len(volume) - 1, min(rows, len(volume))).round().astype(int))
    sections = volume.normalized() if with_images else np.full(volume.images.shape, _PLAIN, np.float32)
    headings = _HEADINGS if with_images else _HEADINGS[1:]
    height = 2.35 * sections.shape[1] / sections.shape[2]
    figure, axes = panels(len(chosen), len(headings), 12, height * len(chosen) + 1.0)
    for row, index in zip(axes, chosen, strict=True):
        section, truth, found = sections[index], volume.labels[index], probabilities[index]
        segments = thinned(found > threshold)
        _show(row, section, truth, found, segments)
        row[0].set_ylabel(f"{index + 1} of {len(volume)}", fontsize=9, color=GREY)
        if truth.any():  # otherwise there is nothing to find
            score = rand_score(segments, components(truth))
            row[-2].set_xlabel(f"V-Rand {score.f:.3f}", fontsize=9, color=GREY)
            row[-1].set_xlabel(f"precision {score.precision:.3f}, recall {score.recall:.3f}", fontsize=9, color=GREY)
    for cell, heading in zip(axes[0], headings, strict=True):
        cell.set_title(heading, fontsize=10)
    figure.suptitle(f"{title}\n", fontsize=11)
    _legend(figure)
    return written(figure, path)


def _show(row: Sequence[Axes], section: np.ndarray, truth: np.ndarray, found: np.ndarray, segments: np.ndarray) -> None:
    merged, split = errors(segments, components(truth))
    grey = np.repeat(section[:, :, None], 3, axis=2)
    pictures = (
        section,
        truth,
        found,
        _overlaid(grey, coloured(segments), segments > 0, 0.45),
        _wrong(grey, truth, merged, split),
    )
    for cell, picture in zip(row, pictures[-len(row) :], strict=True):
        cell.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="antialiased")
        cell.set(xticks=[], yticks=[])
        cell.spines[:].set_visible(False)


def _overlaid(grey: np.ndarray, colours: np.ndarray, where: np.ndarray, share: float) -> np.ndarray:
    return np.where(where[:, :, None], (1 - share) * grey + share * colours, grey)


def _wrong(grey: np.ndarray, truth: np.ndarray, merged: np.ndarray, split: np.ndarray) -> np.ndarray:
    """The truth's cells, pale, in the colours of what happened to them."""
    pale = np.where(truth[:, :, None], 0.6 + 0.4 * grey, 0.25 * grey)
    colours = np.zeros_like(grey)
    colours[merged], colours[split] = _MERGED, _SPLIT
    colours[merged & split] = _both()
    return _overlaid(pale, colours, merged | split, 0.6)


def _both() -> tuple[float, ...]:
    return tuple((a + b) / 2 for a, b in zip(_MERGED, _SPLIT, strict=True))


def _legend(figure: Any) -> None:
    patch = needed("matplotlib.patches", "a picture").Patch
    wrong = ((_MERGED, "merged with another cell: lowers precision"), (_SPLIT, "split: lowers recall"))
    shown = ((_FOUND, "a cell, found as it is"), *wrong, (_both(), "both"))
    handles = [patch(color=colour, alpha=0.75, label=words) for colour, words in shown]
    figure.legend(handles=handles, loc="outside lower right", ncols=4, frameon=False, fontsize=9)


def plot_curves(
    path: Path | None,
    losses: Sequence[float],
    history: Sequence[Mapping[str, float]],
    evaluations: Mapping[str, Evaluation],
    title: str,
) -> Any:
    """Draw the loss of every step, the held-out V-Rand while the network learned, and V-Rand by the threshold."""
    figure, axes = panels(1, 3 if losses else 1, 12 if losses else 5, 4)
    cells = list(axes[0])
    if losses:
        _losses(cells[0], losses)
        _learning(cells[1], history)
    _thresholds(cells[-1], evaluations)
    for cell in cells:
        style(cell)
    handles, words = cells[-1].get_legend_handles_labels()
    figure.legend(handles, words, loc="outside lower right", ncols=2, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    return written(figure, path)


def _losses(axes: Axes, losses: Sequence[float]) -> None:
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color=FAINT, linewidth=0.7, label="every step")
    mean = trailing_mean(np.asarray(losses), np.ones(len(losses)), _WINDOW)
    axes.plot(steps, mean, color=BLUE, linewidth=1.6, label=f"last {_WINDOW}")
    axes.set(xlabel="step", ylabel="cross entropy", title="Loss", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)


def _learning(axes: Axes, history: Sequence[Mapping[str, float]]) -> None:
    steps = [measured["step"] for measured in history]
    for name, colour, words in (("v_rand", BLUE, "thinned"), ("v_rand_unthinned", ORANGE, "as found")):
        axes.plot(steps, [measured[name] for measured in history], color=colour, marker="o", markersize=4, label=words)
    axes.set(xlabel="step", ylabel="V-Rand", title="Held-out sections")
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _thresholds(axes: Axes, evaluations: Mapping[str, Evaluation]) -> None:
    for (name, scores), line in zip(evaluations.items(), ("-", "--", ":", "-."), strict=False):
        curves = ((scores.thinned, BLUE, "thinned"), (scores.plain, ORANGE, "as found"))
        for curve, colour, words in curves:
            if curve:
                thresholds = [point.threshold for point in curve.points]
                values = [point.rand.f for point in curve.points]
                axes.plot(thresholds, values, line, color=colour, label=f"{name}, {words}")
        best = scores.best
        axes.plot(best.threshold, best.rand.f, "o", color=GREEN, markersize=5)
    axes.set(xlabel="threshold", ylabel="V-Rand", title="Thresholds", ylim=(0, 1))
