"""A run as tables on a terminal, or as plain text in a pipe."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bench import report as words
from bench.report import throughput
from bench.report.summary import Group, Line, Tally, Total, Versus, summarize, tallies
from bench.report.throughput import Throughput, throughputs
from bench.results import Results
from gpukern import tables

#: Columns of output into a pipe: there is no window to fit, and nothing may be truncated.
WIDE = 160
#: Columns of a window that a table takes without its peers, and for each of them. More peers than fit get a table more.
_FIXED, _PEER = 52, 15
_COLOURS = {"win": "green", "loss": "red", "tie": "yellow"}


def console() -> Console:
    here = Console(highlight=False)
    return here if here.is_terminal else Console(width=WIDE, color_system=None, highlight=False)


def show(results: Results, to: Console | None = None) -> None:
    """Print all of it."""
    to = to or console()
    evidence = words.evidence(results.environment, results.ceilings)
    to.print(tables.pairs(evidence + words.text_pairs(results.method) + words.settings(results)))
    groups = summarize(results)
    for group in groups:
        to.print()
        # A peer without any time is a note below: its reason is the only information.
        timed = [name for name in group.peers if group.timing_of(name)]
        fitting = max(1, (to.width - _FIXED) // _PEER)
        for first in range(0, max(1, len(timed)), fitting):
            to.print(_table(group, timed[first : first + fitting]))
        for timing, rows in throughputs(group):
            to.print()
            to.print(_throughput_table(group, timing, rows))
        _notes(group, to)
    if groups:
        to.print()
        everything = tallies([line for group in groups for line in group.lines])
        to.print(_tallies(f"All {words.count(len(results.rows), 'row')}", everything))


def new_table(title: str, caption: str, columns: Sequence[str], left: int = 1) -> Table:
    """The first ``left`` columns are words, the others numbers."""
    return tables.table(*columns[:left], *tables.numbers(*columns[left:]), title=title, caption=caption, narrow=True)


def _table(group: Group, peers: Sequence[str]) -> Table:
    usual = {name: group.timing_of(name) for name in peers}
    heads = [
        words.one_line(name) + (f" ({timing})" if timing != group.timing else "") for name, timing in usual.items()
    ]
    timed = words.TIMINGS.get(group.timing or "", "not timed")
    caption = f"{timed}, median ± half of its 95 % interval; × is the peer's time"
    columns = ["layer", "gpukern µs", *heads, "of limit", "bound"]
    table = new_table(words.group_title(group.key), caption + " / gpukern's", columns)
    for line in group.lines:
        by_name = {peer.candidate.name: peer for peer in line.peers}
        cells = [_peer(by_name.get(name), timing) for name, timing in usual.items()]
        name = Text(words.case_name(line.row.case))
        table.add_row(name, _ours(line, group.timing), *cells, words.percent(line.share), line.bound or "–")
    table.add_section()
    tallies_ = [tally for tally in group.tallies if tally.name in usual]
    table.add_row("geometric mean", "", *(Text(words.ratio(t.mean), style="bold") for t in tallies_))
    table.add_row("wins / losses / ties", "", *(f"{t.wins} / {t.losses} / {t.ties}" for t in tallies_))
    for network in group.networks:
        totals = group.totals_of(network)
        ours = max(totals.values(), key=lambda total: total.covered)
        cells = [_total(totals.get(name)) for name in usual]
        table.add_row(
            Text(f"Σ {words.one_line(network)}, {words.count(ours.covered, 'layer')}"),
            words.micro(ours.ours_us),
            *cells,
        )
    return table


def _throughput_table(group: Group, timing: str, rows: Sequence[Throughput]) -> Table:
    title = f"{words.group_title(group.key)}: images a second, {timing}"
    table = new_table(title, throughput.CAPTION, throughput.COLUMNS, left=throughput.WORDS)
    for row in rows:
        cells = [Text(cell) for cell in row.cells]
        cells[throughput.RATIO].stylize(_COLOURS.get(row.outcome or "", ""))
        table.add_row(*cells, style="bold" if row.ours else "")
    return table


def _total(total: Total | None) -> Text:
    if total is None or not total.covered:
        return Text("–")
    # Fewer layers than gpukern's own sum: the ratio is over those alone.
    part = f"\n{total.covered} of {total.layers}" if total.covered < total.layers else ""
    return Text(f"{words.micro(total.peer_us)} {words.ratio(total.peer_us / total.ours_us)}{part}")


def _ours(line: Line, usual: str | None) -> Text:
    if line.time is None:
        return Text(words.state(line.ours), style="bold red")
    mark = f" {line.timing}" if line.timing != usual else ""
    return Text(f"{words.micro(line.time.median)} {words.plus_minus(line.time)}{mark}")


def _peer(peer: Versus | None, usual: str | None) -> Text:
    if peer is None:
        return Text("–")
    if peer.time is None:
        return Text(words.state(peer.candidate), style="magenta")
    value = Text(words.micro(peer.time.median) + (f" {peer.timing}" if peer.timing != usual else ""))
    outcome = peer.outcome
    return value if outcome is None else value.append(f" {words.ratio(peer.median)}", style=_COLOURS[outcome])


def _notes(group: Group, to: Console) -> None:
    best = group.tallies[0]
    mean = f"geometric mean {words.ratio(best.mean)}, {words.record(best.wins, best.losses, best.ties)}"
    to.print(Text(f"Against the best peer of each row: {mean}."))
    for problem in group.problems:
        style = "bold red" if problem.ours else "bold"
        text = Text(words.one_line(f"{problem.name} {problem.status}"), style=style)
        text.append(f" ({words.cases(problem.cases)}): {problem.reason}", style="not bold default")
        to.print(Padding(text, (0, 0, 0, 2)))


def _tallies(title: str, found: Sequence[Tally]) -> Table:
    table = new_table(title, "", ["gpukern against", "geometric mean", "wins", "losses", "ties", "not compared"])
    for tally in found:
        numbers = map(str, (tally.wins, tally.losses, tally.ties, tally.absent))
        table.add_row(Text(words.one_line(tally.name)), words.ratio(tally.mean), *numbers)
    return table
