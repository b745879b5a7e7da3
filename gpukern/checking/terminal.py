"""A report on a terminal, and as plain text in anything else."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from gpukern import tables
from gpukern.checking import formatting
from gpukern.checking.values import ReportValues

#: Findings that are written out; the table and JSON have all.
_LISTED = 12
_CAPTION = "Errors beside float64, in shares of their bounds: over 100% is more than rounding explains."


def render(report: ReportValues) -> RenderableType:
    """Render the whole report for a rich console."""
    found = report.findings
    more = len(found) - _LISTED
    return Group(
        Text(formatting.headline(report), style="bold red" if found else "bold"),
        *(Text(f"✗ {each}", style="red") for each in found[:_LISTED]),
        *([Text(f"and {more} more", style="red")] if more > 0 else []),
        *(Text(f"note: {note}", style="yellow") for note in report.notes),
        _table(report),
        *(Text(f"{each.name}: {each.note}", style="yellow") for each in report.layers if each.note),
    )


def _table(report: ReportValues) -> RenderableType:
    columns = tables.numbers(*(name for name, _, _ in formatting.COLUMNS))
    table = tables.table("layer", "type", *columns, caption=_CAPTION, narrow=True)
    for layer in report.layers:
        cells = [Text(each.text, style="bold red" if each.left else "") for each in formatting.cells(layer)]
        kind = f"{layer.type} (torch)" if layer.reason else layer.type
        table.add_row(Text(layer.name), Text(kind), *cells)
    return table
