"""A report as one HTML page that asks for nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template

from gpukern.fusion.report import formatting
from gpukern.fusion.report.svg import COLOURS, picture
from gpukern.fusion.report.values import FusedGroup, GraphNode, ReportValues

_TEMPLATE = Path(__file__).with_name("page.html")
#: Numbers written under the bars, at most.
_LABELS = 30


def page(report: ReportValues) -> str:
    """The page; the same report gives the same bytes."""
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=_text(f"{report.model}, fused"),
        lead=_text(formatting.headline(report)) + ".",
        notes=_notes(report),
        cards="".join(_cards(report)),
        comparison=_comparison(report),
        before=picture(report.graph_before, report.fused, "The graph before", "b"),
        after=picture(report.graph_after, report.fused, "The graph after", "a"),
        before_count=_nodes(report.graph_before),
        after_count=_nodes(report.graph_after),
        bars=_bars(report.fused),
        groups=_groups(report),
        left=_left(report),
        environment=_pairs(report.environment),
    )


def _text(value: str) -> str:
    return escape(formatting.clean(value))


def _nodes(graph: Sequence[GraphNode]) -> str:
    return formatting.count(len(graph), "node")


def _notes(report: ReportValues) -> str:
    items = "".join(f"<li>{_text(note)}</li>" for note in report.notes)
    return f'<ul class="notes">{items}</ul>' if items else ""


def _cards(report: ReportValues) -> Iterator[str]:
    before, after = report.before, report.after
    if report.timing_before and report.timing_after:
        fast = report.timing_after
        gain = formatting.times(report.timing_before.median, fast.median)
        yield _card("faster", gain, f"{formatting.digits(fast.images_per_second, 4)} images per second")
    fewer = formatting.times(before.operators, after.operators)
    yield _card("operators per forward", f"{before.operators:,} → {after.operators:,}", f"{fewer} fewer")
    moved = [formatting.megabytes(size) for size in (before.activation_bytes, after.activation_bytes)]
    less = formatting.times(before.activation_bytes, after.activation_bytes)
    yield _card("activations moved", less, f"less: {moved[0]} → {moved[1]}")
    yield _error_card(report)
    yield _card("groups fused", f"{len(report.fused):,}", f"{len(report.not_fused) or 'nothing'} left as it was")


def _error_card(report: ReportValues) -> str:
    check = report.verification
    if check is None:
        return _card("error", formatting.NONE, "not verified")
    agreement = (
        "" if check.argmax_agreement is None else f", argmax agrees in {formatting.percent(check.argmax_agreement)}"
    )
    name = f"error against {check.truth}"
    return _card(
        name,
        formatting.error(check.error),
        f"unfused {formatting.error(check.unfused)}{agreement}",
        _kind(check.passed),
    )


def _kind(good: bool) -> str:
    return "good" if good else "bad"


def _card(name: str, value: str, detail: str, kind: str = "") -> str:
    return (
        f'<div class="card"><span>{_text(name)}</span><b class="{kind}">{_text(value)}</b>'
        f"<small>{_text(detail)}</small></div>"
    )


def _comparison(report: ReportValues) -> str:
    rows = "".join(
        f'<tr><td>{_text(line.name)}</td><td class="n">{_text(line.before)}</td><td class="n">{_text(line.after)}</td>'
        f"<td>{_text(line.gain)}</td></tr>"
        for line in formatting.comparison(report)
    )
    return (
        '<table class="comparison"><thead><tr><th></th><th class="n">before</th><th class="n">after</th><th>gain</th>'
        f"</tr></thead><tbody>{rows}</tbody></table>"
    )


# ---- a bar for each group ------------------------------------------------------------------------------------------


def _bars(groups: Sequence[FusedGroup]) -> str:
    """Of the most telling figure that is known of the groups."""
    for title, name, unit in (
        ("Expected µs of each group; the black line is the roofline's floor", "expected", 1e6),
        ("MB that each group moves", "bytes", 1e-6),
        ("Error of each group's output, ‖y − truth‖ / ‖truth‖", "error", 1.0),
    ):
        values = [None if (value := getattr(group, name)) is None else value * unit for group in groups]
        finite = [value for value in values if value is not None and math.isfinite(value)]
        if finite and max(finite) > 0:
            floors = [group.floor * unit if group.floor else None for group in groups] if name == "expected" else []
            return f'<h2>{escape(title)}</h2>\n<div class="panel">{_chart(groups, values, floors)}</div>'
    return ""


def _chart(groups: Sequence[FusedGroup], values: list[float | None], floors: list[float | None]) -> str:
    step, top = _scale([value for value in (*values, *floors) if value is not None and math.isfinite(value)])
    ticks = [number * step for number in range(round(top / step) + 1)]
    lines = "".join(f'<line x1="0" x2="100%" y1="{_at(tick, top)}" y2="{_at(tick, top)}"/>' for tick in ticks)
    names = "".join(f'<span class="y" style="top:{_at(tick, top)}">{tick:,.6g}</span>' for tick in ticks)
    every = math.ceil(len(groups) / _LABELS)
    numbers = "".join(
        f'<span class="x" style="left:{(number + 0.5) / len(groups):.3%}">{number + 1}</span>'
        for number in range(0, len(groups), every)
    )
    bars = "".join(
        _bar(number, group, value, floors[number] if floors else None, len(groups), top)
        for number, (group, value) in enumerate(zip(groups, values, strict=True))
        if value is not None and math.isfinite(value)
    )
    return (
        f'<div class="bars"><svg role="img" aria-label="A bar for each group">{lines}{bars}</svg>{names}{numbers}</div>'
    )


def _scale(values: list[float]) -> tuple[float, float]:
    """Distance of the ticks and the highest of them: 1, 2 or 5 times a power of ten, three to six ticks."""
    highest = max(values)
    power = 10.0 ** math.floor(math.log10(highest / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 5.001 >= highest)
    return step, step * math.ceil(highest / step - 1e-9)


def _at(value: float, top: float) -> str:
    return f"{1 - value / top:.3%}"


def _bar(number: int, group: FusedGroup, value: float, floor: float | None, count: int, top: float) -> str:
    left, width = (number + 0.12) / count, 0.76 / count
    tip = "\n".join([f"{number + 1}. {group.pattern}: {formatting.digits(value)}", *group.modules])
    line = ""
    if floor is not None:
        y = _at(floor, top)
        line = f'<line class="floor" x1="{left:.3%}" x2="{left + width:.3%}" y1="{y}" y2="{y}"/>'
    return (
        f'<a href="#g{number + 1}" class="c{number % COLOURS}" data-group="{number + 1}"><title>{_lines(tip)}</title>'
        f'<rect x="{left:.3%}" width="{width:.3%}" y="{_at(value, top)}" height="{value / top:.3%}"/>{line}</a>'
    )


def _lines(text: str) -> str:
    return "\n".join(_text(line) for line in text.split("\n"))


# ---- tables --------------------------------------------------------------------------------------------------------


def _groups(report: ReportValues) -> str:
    if not report.fused:
        return '<div class="panel">nothing</div>'
    columns = formatting.columns(report)
    heads = "".join(f"<th{_numbers(column)}>{escape(column.name)}</th>" for column in columns)
    rows = "".join(_row(number, group, columns) for number, group in enumerate(report.fused, start=1))
    return (
        f'<div class="panel scroll"><table><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _numbers(column: formatting.Column) -> str:
    return ' class="n"' if column.numbers else ""


def _row(number: int, group: FusedGroup, columns: Sequence[formatting.Column]) -> str:
    cells = "".join(f"<td{_numbers(column)}>{escape(column.cell(group))}</td>" for column in columns)
    link = f'<a class="number c{(number - 1) % COLOURS}" href="#a{number}">{number}</a>'
    return f'<tr id="g{number}" data-group="{number}"><td>{link}</td>{cells}</tr>'


def _left(report: ReportValues) -> str:
    items = "".join(
        f"<li><b>{escape(reason)}</b> ({len(names)})<small>{escape(', '.join(names))}</small></li>"
        for reason, names in formatting.reasons(report).items()
    )
    return f'<ul class="left">{items}</ul>' if items else "nothing was left"


def _pairs(pairs: dict[str, str]) -> str:
    items = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in pairs.items())
    return f"<dl>{items}</dl>"
