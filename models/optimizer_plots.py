"""The two pictures that compare optimizers: how the loss fell with each, and which ways they take downhill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpukern.diagnose.figures import figure as empty_figure
from gpukern.diagnose.figures import panels, style, written
from models.paths import SURFACES, Surface, path
from models.plots import WINDOW, batch_sizes, trailing_mean
from models.trainer import Trainer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: name → (as the lecture writes it, colour), the same in both pictures.
LOOKS = {
    "sgd": ("SGD", "#6b7280"),
    "momentum": ("Momentum", "#1f4e9c"),
    "nesterov": ("Nesterov", "#2a9fd6"),
    "adagrad": ("AdaGrad", "#b07d00"),
    "rmsprop": ("RMSprop", "#2e8b57"),
    "adam": ("Adam", "#c2331a"),
    "adamw": ("AdamW", "#a04bb5"),
}
_COLUMNS = 3


def plot_losses(picture: Path, trainers: Sequence[Trainer], title: str) -> None:
    """The loss by samples seen, averaged over the last of them, a curve for each of the finished ``trainers``."""
    figure, cells = panels(1, 1, 9, 5)
    axes = cells[0, 0]
    ends = {}
    for trainer in trainers:
        name = trainer.config.optimizer
        sizes = batch_sizes(len(trainer.losses), len(trainer.train), trainer.batch_size)
        # The mean of logarithms, as the axis is: one bad mini-batch would lift an arithmetic one over all the window.
        means = np.exp(trailing_mean(np.log(np.maximum(trainer.losses, 1e-7)), sizes))
        # Dashed, because AdamW runs on top of Adam.
        dashes = "--" if name == "adamw" else "-"
        axes.plot(np.cumsum(sizes), means, color=LOOKS[name][1], linewidth=1.6, linestyle=dashes)
        if len(means):
            ends[name] = means[-1]
    axes.set(yscale="log", ylabel=f"cross-entropy loss, geometric mean of {WINDOW:,} samples", title=title)
    axes.set(xlabel="training samples seen", xlim=(0, None))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    style(axes)
    _label_ends(axes, ends, {trainer.config.optimizer: trainer.config.lr for trainer in trainers})
    written(figure, picture)


def _label_ends(axes: Axes, ends: Mapping[str, float], rates: Mapping[str, float | None]) -> None:
    """Names beside the ends of their curves, one at least a line above the other."""
    if not ends:
        return
    line = 0.055  # of the height of the axes
    to_axes = axes.transScale + axes.transLimits
    names = sorted(ends, key=ends.__getitem__)
    heights: list[float] = []
    for name in names:
        height = to_axes.transform((0, ends[name]))[1]
        heights.append(max(height, heights[-1] + line if heights else 0.0))
    # The labels move down together as far as the highest is above the axes.
    shift = max(0.0, heights[-1] - 1 + line / 2)
    for name, height in zip(names, heights, strict=True):
        title, colour = LOOKS[name]
        place = (1.015, height - shift)
        axes.text(*place, f"{title}, {rates[name]:g}", color=colour, transform=axes.transAxes, va="center")


def plot_paths(picture: Path, surfaces: Sequence[Surface] = SURFACES) -> None:
    """For every surface a panel for each of its optimizers: contour lines, and the way from the start to the end."""
    rows = [-(-len(surface.rates) // _COLUMNS) for surface in surfaces]
    figure = empty_figure(10.5, 2.35 * sum(rows))
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.12)
    parts = figure.subfigures(len(surfaces), 1, height_ratios=rows, squeeze=False)[:, 0]
    for part, surface, height in zip(parts, surfaces, rows, strict=True):
        part.suptitle(surface.title, fontsize=12)
        cells = part.subplots(height, _COLUMNS, sharex=True, sharey=True, squeeze=False)
        for panel in cells.flat[len(surface.rates) :]:
            panel.set_axis_off()
        for panel, name in zip(cells.flat, surface.rates, strict=False):
            _panel(panel, surface, name)
    figure.supxlabel("○ start     • after an update     ✖ end", fontsize=9, color="#555555")
    written(figure, picture)


def _panel(axes: Axes, surface: Surface, name: str) -> None:
    left, right, bottom, top = surface.frame
    title, colour = LOOKS[name]
    _contours(axes, surface)
    places = path(surface, name)
    steps = len(places) - 1
    if surface.holds(*places[-1]):
        reached = f"height {surface.value(*places[-1]):.2g} after {steps} steps".replace("-", "−")
    else:
        reached = f"gone at step {steps}"
        places[-1] = _cut(surface, *places[-2:])
    axes.plot(*places.T, color=colour, linewidth=1.4, marker="o", markersize=2.6)
    axes.plot(*places[0], marker="o", markersize=7, color="white", markeredgecolor=colour, markeredgewidth=1.6)
    axes.plot(*places[-1], marker="X", markersize=9, color=colour, markeredgecolor="white", clip_on=False, zorder=5)
    axes.set_title(f"{title}, rate {surface.rates[name]:g}: {reached}", fontsize=9, color=colour, pad=8)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.locator_params(nbins=6)
    axes.tick_params(labelsize=7, colors="#888888", length=2)
    axes.spines[:].set_color("#cccccc")


def _cut(surface: Surface, inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Where the way from ``inside`` to ``outside`` leaves the frame."""
    left, right, bottom, top = surface.frame
    border = outside.clip((left, bottom), (right, top))
    with np.errstate(invalid="ignore"):
        share = (border - inside) / (outside - inside)
    return inside + np.nanmin(share) * (outside - inside)


def _contours(axes: Axes, surface: Surface) -> None:
    left, right, bottom, top = surface.frame
    x, y = np.meshgrid(np.linspace(left, right, 200), np.linspace(bottom, top, 200))
    values = surface.value(x, y)
    # Closer together near the lowest point, or around zero where there is none.
    fractions = np.linspace(0, 1, 10)[1:] ** 2
    levels = fractions * values.max()
    if values.min() < 0:
        levels = np.concatenate([fractions[::-1] * values.min(), [0], levels])
    axes.contour(x, y, values, levels=levels, colors="#c3cad6", linewidths=0.7, linestyles="solid")
