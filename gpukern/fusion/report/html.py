"""A report as one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from gpukern import formatting as numbers
from gpukern.fusion.report import formatting as words
from gpukern.fusion.report.svg import COLOURS, picture
from gpukern.fusion.report.values import FusedGroup, Quantization, Reached, ReportValues
from gpukern.pages import render

_TEMPLATE = Path(__file__).with_name("page.html")
#: Numbers written under the bars, at most.
_LABELS = 30


def page(report: ReportValues) -> str:
    """The page; the same report gives the same bytes."""
    return render(
        _TEMPLATE,
        report=report,
        words=words,
        numbers=numbers,
        colours=COLOURS,
        cards=list(_cards(report)),
        before=Markup(picture(report.graph_before, report.fused, "The graph before", "b")),
        after=Markup(picture(report.graph_after, report.fused, "The graph after", "a")),
        chart=_chart(report.fused),
    )


class Card(NamedTuple):
    """A figure to be seen first; ``kind``: "good" or "bad", where it is one."""

    name: str
    value: str
    detail: str
    kind: str = ""


def _cards(report: ReportValues) -> Iterator[Card]:
    before, after = report.before, report.after
    if report.timing_before and report.timing_after:
        fast = report.timing_after
        gain = words.times(report.timing_before.median, fast.median)
        yield Card("faster", gain, f"{numbers.number(fast.images_per_second, 4)} images per second")
    fewer = words.times(before.operators, after.operators)
    yield Card("operators per forward", f"{before.operators:,} → {after.operators:,}", f"{fewer} fewer")
    moved = [numbers.size(size) for size in (before.activation_bytes, after.activation_bytes)]
    less = words.times(before.activation_bytes, after.activation_bytes)
    yield Card("activations moved", less, f"less: {moved[0]} → {moved[1]}")
    if told := report.quantization:
        smaller = words.times(told.bytes_before, told.bytes)
        detail = f"less than in 16 bits: {numbers.size(told.bytes_before)} → {numbers.size(told.bytes)}"
        yield Card("bytes, with weights", smaller, detail)
        if told.reached:
            yield _reached_card(told, told.reached)
    yield _error_card(report)
    yield Card("groups fused", f"{len(report.fused):,}", f"{len(report.not_fused) or 'nothing'} left as it was")


def _reached_card(told: Quantization, reached: Reached) -> Card:
    name, value = words.reached(told, reached)
    detail = f"in 8 bits; target {told.target:g}; signal-to-noise {words.decibels(reached.snr)}"
    return Card(name, value, detail, "good" if reached.value >= told.target else "bad")


def _error_card(report: ReportValues) -> Card:
    check = report.verification
    if check is None:
        return Card("error", numbers.MISSING, "not verified")
    detail = f"unfused {numbers.error(check.unfused)}"
    if check.argmax_agreement is not None:
        detail += f", argmax agrees in {words.agreement(check.argmax_agreement)}"
    kind = "good" if check.passed else "bad"
    return Card(f"error against {check.truth}{words.where(report)}", numbers.error(check.error), detail, kind)


# ---- a bar for each group ------------------------------------------------------------------------------------------


class Bar(NamedTuple):
    """The bar of a group, counted from one; places are percentages of the chart, ``floor`` is "" without one."""

    number: int
    tip: str
    left: str
    width: str
    right: str
    top: str
    height: str
    floor: str


class Chart(NamedTuple):
    """``ticks`` and ``numbers`` are places and labels on the axes."""

    title: str
    ticks: list[tuple[str, str]]
    numbers: list[tuple[str, str]]
    bars: list[Bar]


def _chart(groups: Sequence[FusedGroup]) -> Chart | None:
    """The most telling figure that is known of the groups; None where none is."""
    for title, name, unit in (
        ("Expected µs of each group; the black line is the roofline's floor", "expected", 1e6),
        ("MB that each group moves", "bytes", 1e-6),
        ("Error of each group's output, ‖y − truth‖ / ‖truth‖", "error", 1.0),
    ):
        values = [None if (value := getattr(group, name)) is None else value * unit for group in groups]
        if max(_finite(values), default=0) > 0:
            floors = [group.floor and group.floor * unit if name == "expected" else None for group in groups]
            return _chart_of(title, groups, values, floors)
    return None


def _finite(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _chart_of(
    title: str, groups: Sequence[FusedGroup], values: Sequence[float | None], floors: Sequence[float | None]
) -> Chart:
    step, top = _scale([*_finite(values), *_finite(floors)])
    ticks = [number * step for number in range(round(top / step) + 1)]
    every = math.ceil(len(groups) / _LABELS)
    return Chart(
        title,
        [(_share(1 - tick / top), numbers.tick(tick)) for tick in ticks],
        [(_share((number + 0.5) / len(groups)), str(number + 1)) for number in range(0, len(groups), every)],
        [
            _bar(number, group, value, floors[number], len(groups), top)
            for number, (group, value) in enumerate(zip(groups, values, strict=True))
            if value is not None and math.isfinite(value)
        ],
    )


def _scale(values: list[float]) -> tuple[float, float]:
    """Distance of the ticks and the highest of them: 1, 2 or 5 times a power of ten, three to six ticks."""
    highest = max(values)
    power = 10.0 ** math.floor(math.log10(highest / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 5.001 >= highest)
    return step, step * math.ceil(highest / step - 1e-9)


def _bar(number: int, group: FusedGroup, value: float, floor: float | None, count: int, top: float) -> Bar:
    left, width = (number + 0.12) / count, 0.76 / count
    return Bar(
        number + 1,
        "\n".join([f"{number + 1}. {group.pattern}: {numbers.number(value)}", *group.modules]),
        _share(left),
        _share(width),
        _share(left + width),
        _share(1 - value / top),
        _share(value / top),
        "" if floor is None else _share(1 - floor / top),
    )


def _share(value: float) -> str:
    return f"{value:.3%}"
