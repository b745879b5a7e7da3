"""A sanity check as a table, for a terminal and as plain text."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from gpukern import tables
from gpukern.diagnose.sanity.values import SanityValues
from gpukern.formatting import count

_COLOURS = {"ok": "green", "warning": "yellow", "wrong": "bold red", "not checked": "dim"}


def render(report: SanityValues) -> RenderableType:
    """The checks in their order, then what to do about those that are wrong or warn."""
    made = tables.table("check", "verdict", "what was found")
    for check in report.checks:
        made.add_row(Text(check.name), Text(check.verdict, style=_COLOURS[check.verdict]), Text(check.finding))
    advice = (
        Text(f"{check.name}: {check.advice}", style=_COLOURS[check.verdict])
        for check in report.findings
        if check.advice
    )
    return Group(Text(_headline(report), style="bold"), made, *advice)


def _headline(report: SanityValues) -> str:
    numbers = {verdict: sum(check.verdict == verdict for check in report.checks) for verdict in _COLOURS}
    told = [f"{numbers['wrong']} wrong"] if numbers["wrong"] else []
    told += [count(numbers["warning"], "warning")] if numbers["warning"] else []
    checked = len(report.checks) - numbers["not checked"]
    return f"{report.model}: {count(checked, 'check')}, {', '.join(told) or 'all well'}"
