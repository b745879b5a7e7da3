"""The picture of a search: every run as a line through its settings, and its value by each of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gpukern.diagnose.figures import BLUE, FAINT, GREY, ORANGE, figure, style
from gpukern.diagnose.search_values import Run, SearchValues
from gpukern.diagnose.space import Choice, Range
from gpukern.formatting import brief

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Parameters beside each other in the lower row.
_COLUMNS = 5


def draw(report: SearchValues) -> Figure:
    """Parallel coordinates above; below for each parameter the values of the runs, the best in another colour."""
    names = list(report.space)
    columns = min(_COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    made = figure(max(8.0, 2.9 * columns), 3.4 + 2.6 * rows)
    grid = made.add_gridspec(1 + rows, columns, height_ratios=(1.3, *[1.0] * rows))
    _parallel(made.add_subplot(grid[0, :]), report, names)
    first: Axes | None = None
    for number, name in enumerate(names):
        axes = made.add_subplot(grid[1 + number // columns, number % columns], sharey=first)
        first = first or axes
        _scatter(axes, report, name)
        if number % columns == 0:
            axes.set_ylabel("value")
    later = "; squares, shaded ranges: later rounds" if len(report.rounds) > 1 else ""
    made.supxlabel(f"star: the best; hollow: ended early{later}", fontsize=8.5, color=GREY)
    return made


def _shown(report: SearchValues) -> list[Run]:
    """Runs with a value, the worst first, so that the best are drawn over them."""
    runs = [run for run in report.runs if run.value is not None and math.isfinite(run.value)]
    runs.sort(key=lambda run: run.value or 0.0, reverse=not report.maximize)
    return [run for run in runs if run.state != "complete"] + [run for run in runs if run.state == "complete"]


def _parallel(axes: Axes, report: SearchValues, names: Sequence[str]) -> None:
    runs = _shown(report)
    values = [run.value for run in runs if run.state == "complete" and run.value is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    line: dict[str, Any]
    for number, run in enumerate(runs):
        places = [_place(report.space[name], run.settings[name], number) for name in names]
        colour: Any = FAINT
        line = {"linewidth": 0.8, "alpha": 0.6}
        if run.state == "complete" and run.value is not None:
            rank = (run.value - low) / (high - low) if high > low else 0.0
            colour, line = _shade(1 - rank if report.maximize else rank), {"linewidth": 1.4, "alpha": 0.9}
        if run is report.best:
            colour, line = ORANGE, {"linewidth": 2.8, "alpha": 1.0}
        axes.plot(range(len(names)), places, color=colour, **line)
    for number, name in enumerate(names):
        axes.axvline(number, color=GREY, linewidth=0.8)
        space = report.space[name]
        if isinstance(space, Range):
            ends = ((0.0, brief(space.low), "top"), (1.0, brief(space.high), "bottom"))
            for place, word, side in ends:
                axes.text(
                    number, place + (0.03 if place else -0.03), word, ha="center", va=side, fontsize=7.5, color=GREY
                )
        else:
            for index, value in enumerate(space.values):
                axes.text(number + 0.02, _of_choice(space, index), str(value), fontsize=7.5, va="center", color=GREY)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks([])
    axes.set(ylim=(-0.12, 1.12), xlim=(-0.15, max(len(names) - 1 + 0.15, 0.5)))
    best = report.best
    told = f", best {best.value:.4g} (orange)" if best is not None and best.value is not None else ""
    axes.set_title(f"{len(report.runs)} runs, dark: better, grey: ended early{told}", fontsize=10)
    axes.spines[:].set_visible(False)


def _shade(rank: float) -> tuple[float, float, float]:
    """From dark blue, the best, to light blue."""
    dark, light = (0.03, 0.19, 0.42), (0.70, 0.82, 0.93)
    return tuple(a + rank * (b - a) for a, b in zip(dark, light, strict=True))  # type: ignore[return-value]


def _place(space: Range | Choice, value: Any, number: int) -> float:
    if isinstance(space, Range):
        return space.place(value)
    # Beside each other, or a hundred runs of two values would be two lines.
    return _of_choice(space, space.values.index(value)) + 0.02 * (number % 7 - 3)


def _of_choice(space: Choice, index: int) -> float:
    return (index + 0.5) / len(space.values)


def _scatter(axes: Axes, report: SearchValues, name: str) -> None:
    space = report.space[name]
    for run in _shown(report):
        best = run is report.best
        where = run.settings[name] if isinstance(space, Range) else space.values.index(run.settings[name])
        early = run.state != "complete"
        axes.plot(
            where, run.value or 0.0, "*" if best else "o" if run.round == 1 else "s", markersize=13 if best else 4.5,
            color=ORANGE if best else BLUE if not early else FAINT, markerfacecolor="none" if early else None,
            zorder=3 if best else 2,
        )  # fmt: skip
    if isinstance(space, Range):
        if space.log:
            axes.set_xscale("log")
        axes.set_xlim(_beyond(space, -0.04), _beyond(space, 1.04))
        for narrow in report.rounds[1:]:
            inner = narrow[name]
            if isinstance(inner, Range):
                axes.axvspan(inner.low, inner.high, color=FAINT, alpha=0.25, linewidth=0, zorder=0)
    else:
        axes.set_xticks(range(len(space.values)), [str(value) for value in space.values], fontsize=8)
        axes.set_xlim(-0.5, len(space.values) - 0.5)
    values = [run.value for run in report.ranked if run.value is not None]
    if values and min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
    axes.set_xlabel(name)
    style(axes)


def _beyond(space: Range, place: float) -> float:
    """The value at a place outside of 0 to 1."""
    if space.log:
        return space.low * (space.high / space.low) ** place
    return space.low + place * (space.high - space.low)
