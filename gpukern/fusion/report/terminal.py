"""A report on a terminal, and as plain text in anything else."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gpukern import tables
from gpukern.fusion.report import formatting
from gpukern.fusion.report.values import ReportValues
from gpukern.tables import Column

#: Names listed of those that share a reason; a page or JSON has all of them.
_LISTED = 6


def render(report: ReportValues) -> RenderableType:
    """Render the whole report for a rich console."""
    failed = report.verification is not None and not report.verification.passed
    return Group(
        Text(formatting.headline(report), style="bold red" if failed else "bold"),
        *(Text(f"note: {formatting.clean(note)}", style="yellow") for note in report.notes),
        _comparison(report),
        *_eight_bits(report),
        *_groups(report),
        *_left(report),
        *_environment(report),
    )


def _comparison(report: ReportValues) -> RenderableType:
    table = tables.table("", *tables.numbers("before", "after"), "gain")
    for line in formatting.comparison(report):
        table.add_row(line.name, line.before, Text(line.after, style="bold"), line.gain)
    if report.verification is None:
        table.caption = Text("not verified", style="yellow")
    return table


def _eight_bits(report: ReportValues) -> Iterator[RenderableType]:
    """What eight bits save and cost, and a row for each group that multiplies by weights."""
    told = report.quantization
    if told is None:
        return
    totals = tables.table("", *tables.numbers("16 bits", "all in 8 bits", "as it is"))
    for line in formatting.in_eight_bits(told):
        totals.add_row(line.name, line.before, line.after, Text(line.gain, style="bold"))
    columns = formatting.quantized_columns(told)
    table = tables.table(Column(""), *(Column(column.name, column.numbers) for column in columns))
    for number, group in enumerate(told.groups, start=1):
        style = "yellow" if group.given_back else ""
        table.add_row(str(number), *(Text(column.cell(group)) for column in columns), style=style)
    yield Text(f"in 8 bits ({told.format})", style="bold")
    yield totals
    yield table


def _groups(report: ReportValues) -> Iterator[RenderableType]:
    """A row each; what no group has gets no column."""
    if not report.fused:
        return
    columns = formatting.columns(report)
    table = tables.table(Column(""), *(Column(column.name, column.numbers) for column in columns))
    for number, group in enumerate(report.fused, start=1):
        table.add_row(str(number), *(Text(column.cell(group)) for column in columns))
    yield Text("fused", style="bold")
    yield table


def _left(report: ReportValues) -> Iterator[RenderableType]:
    if not report.not_fused:
        return
    yield Text("not fused, because", style="bold")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right")
    grid.add_column(overflow="fold")
    for reason, names in formatting.reasons(report).items():
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        grid.add_row(str(len(names)), Text.assemble((reason, "yellow"), ": ", ", ".join(names[:_LISTED]), more))
    yield Padding(grid, (0, 0, 1, 0))


def _environment(report: ReportValues) -> Iterator[RenderableType]:
    if report.environment:
        known = ", ".join(
            f"{formatting.clean(name)} {formatting.clean(value)}" for name, value in report.environment.items()
        )
        yield Text(known, style="dim")
