"""The picture of activation statistics: deviations by layer above, histograms of activations and gradients below."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from gpukern.diagnose.activation_values import ActivationValues, LayerStatistics
from gpukern.diagnose.distribution import BINS, Distribution
from gpukern.diagnose.figures import BLUE, GREY, ORANGE, figure, style
from gpukern.formatting import brief

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Histograms side by side.
COLUMNS = 6


def draw(report: ActivationValues) -> Figure:
    """Deviation of every layer, then a column of histograms for at most :data:`COLUMNS` activations."""
    shown = _chosen(report.activations)
    with_gradients = any(layer.gradient for layer in report.layers)
    rows = 2 + with_gradients
    made = figure(max(7.0, 1.9 * len(shown) + 1.0), 2.9 + 1.8 * (rows - 1))
    grid = made.add_gridspec(rows, len(shown), height_ratios=(1.5, *[1.0] * (rows - 1)))
    _deviations(made.add_subplot(grid[0, :]), report)
    for column, layer in enumerate(shown):
        axes = made.add_subplot(grid[1, column])
        histogram(axes, layer.output, BLUE)
        axes.set_title(_title(layer), fontsize=8.5)
        if column == 0:
            axes.set_ylabel("activations", color=BLUE)
        if with_gradients:
            axes = made.add_subplot(grid[2, column])
            if layer.gradient is None:
                axes.set_axis_off()
                continue
            histogram(axes, layer.gradient, ORANGE)
            axes.set_title(f"deviation {brief(layer.gradient.deviation)}", fontsize=8.5)
            if column == 0:
                axes.set_ylabel("gradients", color=ORANGE)
    return made


def _chosen(layers: tuple[LayerStatistics, ...]) -> list[LayerStatistics]:
    """Some of the layers at equal distances, with the first and the last."""
    places = np.linspace(0, len(layers) - 1, min(COLUMNS, len(layers)))
    return [layers[round(place)] for place in places]


def _title(layer: LayerStatistics) -> str:
    lines = [layer.name if len(layer.name) <= 22 else f"…{layer.name[-21:]}"]
    lines.append(f"deviation {brief(layer.output.deviation)}")
    if layer.dead:
        lines.append(f"{100 * layer.dead:.0f} % dead")
    elif layer.saturated:
        lines.append(f"{100 * layer.saturated:.0f} % saturated")
    elif layer.output.zeros:
        lines.append(f"{100 * layer.output.zeros:.0f} % zeros")
    return "\n".join(lines)


def _deviations(axes: Axes, report: ActivationValues) -> None:
    places = np.arange(len(report.layers))
    outputs = np.array([layer.output.deviation for layer in report.layers])
    gradients = np.array([layer.gradient.deviation if layer.gradient else np.nan for layer in report.layers])
    axes.plot(places, _positive(outputs), color=BLUE, marker="o", markersize=3.5, label="of the output")
    if np.isfinite(gradients).any():
        axes.plot(places, _positive(gradients), color=ORANGE, marker="s", markersize=3.5, label="of its gradient")
        axes.legend(frameon=False, fontsize=8)
    axes.set(yscale="log", ylabel="deviation", title=f"{report.model}: deviations by layer")
    low, high = axes.get_ylim()
    if high < 100 * low:  # less than two decades have few ticks: give them more room
        middle = math.sqrt(low * high)
        axes.set_ylim(min(low, middle / 10), max(high, middle * 10))
    step = math.ceil(len(places) / 24)
    names = [layer.name if len(layer.name) <= 18 else f"…{layer.name[-17:]}" for layer in report.layers]
    rotation, side = (45, "right") if len(places) > 8 else (0, "center")
    axes.set_xticks(places[::step], names[::step], rotation=rotation, ha=side, fontsize=7.5)
    style(axes)


def _positive(values: np.ndarray) -> np.ndarray:
    """Leave gaps where a logarithm has no place."""
    return np.where(values > 0, values, np.nan)


def histogram(axes: Axes, values: Distribution, colour: str) -> None:
    """Draw the values that are not zero, over the part of the bins that has any."""
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(labelsize=7, colors=GREY)
    counts = np.array(values.histogram)
    filled = np.flatnonzero(counts)
    if not len(filled):
        words = "all NaN" if values.nonfinite else "all zero"
        axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes, color=GREY)
        axes.set_xticks([])
        return
    # Tails of a few values would leave the rest one thin line.
    inside = np.flatnonzero(np.minimum(counts.cumsum(), counts[::-1].cumsum()[::-1]) >= max(1, counts.sum() * 2e-4))
    first, last = (inside[0], inside[-1]) if len(inside) else (filled[0], filled[-1])
    wide = max(1, (last - first + 1) // 48)
    edges = np.array(values.edges)
    starts = np.arange(first, min(last + 1, BINS), wide)
    heights = [counts[start : start + wide].sum() for start in starts]
    axes.bar(edges[starts], heights, width=wide * (edges[1] - edges[0]), align="edge", color=colour)
    axes.locator_params(axis="x", nbins=3)
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))
    axes.xaxis.get_offset_text().set_fontsize(6.5)
