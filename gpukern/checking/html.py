"""A report as one self-contained HTML page: a picture of the errors, layer by layer, and the table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gpukern.checking import formatting
from gpukern.checking.values import LayerCheck, ReportValues
from gpukern.formatting import error, tick
from gpukern.pages import render

_TEMPLATE = Path(__file__).with_name("page.html")
#: Shares of a bound below which dots lie on the axis, and the least that the axis ends with.
_LOWEST, _HIGHEST = 1e-4, 10.0
#: Layers numbered under a chart, at most.
_LABELS = 30


def page(report: ReportValues) -> str:
    """The page; the same report gives the same bytes."""
    return render(
        _TEMPLATE,
        report=report,
        headline=formatting.headline(report),
        columns=[name for name, _, _ in formatting.COLUMNS],
        rows=[(layer, formatting.cells(layer)) for layer in report.layers],
        charts=[_chart(report, "alone", "Each layer alone"), _chart(report, "in_model", "Each layer in the model")],
    )


class Dot(NamedTuple):
    """``kind``: classes by who computed what. Places are percentages of the chart."""

    kind: str
    left: str
    top: str
    tip: str


class Chart(NamedTuple):
    """``ticks`` and ``numbers`` are places and labels on the axes; ``bound`` is the place of one."""

    title: str
    ticks: list[tuple[str, str]]
    numbers: list[tuple[str, str]]
    bound: str
    dots: list[Dot]


def _chart(report: ReportValues, field: str, title: str) -> Chart:
    layers = report.layers
    shares = [each.share for layer in layers for suffix in ("", "_torch") for each in [layer.worst(field + suffix)]]
    known = [share for share in shares if share is not None and math.isfinite(share)]
    top = math.ceil(math.log10(max([_HIGHEST, *known])))
    bottom = round(math.log10(_LOWEST))

    def height(share: float) -> str:
        exponent = math.log10(share) if share > 0 else bottom
        return _share((top - min(max(exponent, bottom), top)) / (top - bottom))

    every = max(1, math.ceil(len(layers) / _LABELS))
    return Chart(
        title,
        [(height(10.0**power), f"{tick(100 * 10.0**power)}%") for power in range(bottom, top + 1)],
        [(_across(number, layers), str(number + 1)) for number in range(0, len(layers), every)],
        height(1.0),
        [dot for number, layer in enumerate(layers) for dot in _dots(number, layer, layers, field, height)],
    )


def _dots(number: int, layer: LayerCheck, layers: tuple[LayerCheck, ...], field: str, height) -> Iterator[Dot]:
    for suffix, by, what in (("_torch", "torch", "torchs"), ("", "gpukern", "ours")):
        if field == "alone" and layer.reason and by == "gpukern":
            continue
        for name, gradients in (("output", False), ("gradients", True)):
            worst = formatting.worst(layer, field + suffix, gradients)
            if worst.share is not None:
                kind = f"{what} {'gradient' if gradients else 'output'}{' left' if worst.left else ''}"
                told = f"{number + 1}. {layer.name}, {layer.type}\n{name} by {by}: error {error(worst.error)}"
                told += f", {formatting.share(worst)} of the bound"
                yield Dot(kind, _across(number, layers), height(worst.share), told)


def _across(number: int, layers: tuple[LayerCheck, ...]) -> str:
    return _share((number + 0.5) / len(layers))


def _share(value: float) -> str:
    return f"{value:.3%}"
