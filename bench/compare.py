"""Comparison of two runs of one device: rows that got slower, beyond the noise."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.text import Text

from bench import report as words
from bench.report.summary import common_timing, group_key
from bench.report.terminal import console, new_table
from bench.results import Candidate, Case, Environment, Results, ResultsError, Row
from bench.stats import Spread, spread
from gpukern.tables import pairs

#: A change of our time this small is not reported, however significant it is.
THRESHOLD = 0.02
_COLOURS = {"slower": "red", "faster": "green", "same": "default"}


@dataclass(frozen=True)
class Change:
    """Our time on a row of both runs. ``ratio``: new / old, the machine's own drift taken out; above 1 is slower."""

    case: Case
    timing: str
    old: Spread
    new: Spread
    ratio: float
    verdict: Literal["slower", "faster", "same"]


@dataclass(frozen=True)
class Unclear:
    """A row of both runs without two times of ours to compare."""

    case: Case
    old: str
    new: str
    reason: str

    @property
    def broken(self) -> bool:
        return self.old == "ok" and self.new != "ok"


@dataclass(frozen=True)
class Comparison:
    old: Environment
    new: Environment
    #: Median of new / old over the peers, which did not change: that is the machine, or the versions below.
    drift: float
    drift_samples: int
    #: Slowest first.
    changes: tuple[Change, ...]
    unclear: tuple[Unclear, ...]
    only_old: tuple[Case, ...]
    only_new: tuple[Case, ...]

    @property
    def broken(self) -> tuple[Unclear, ...]:
        return tuple(row for row in self.unclear if row.broken)

    @property
    def worse(self) -> bool:
        """Whether anything is slower or broken."""
        return bool(self.broken) or any(change.verdict == "slower" for change in self.changes)


def compare(old: Results, new: Results) -> Comparison:
    """ResultsError for different devices; other versions, flags or code are the reader's to judge."""
    devices = [results.environment.device for results in (old, new)]
    if devices[0] != devices[1]:
        raise ResultsError(f"runs of different devices do not compare: {devices[0]} and {devices[1]}")
    before, after = ({row.case.key: row for row in results.rows} for results in (old, new))
    both = [(before[key], after[key]) for key in before if key in after]
    peers = [ratio for a, b in both for ratio in _peer_ratios(a, b)]
    drift = statistics.median(peers) if peers else 1.0
    found = [_compare_row(a, b, drift) for a, b in both]
    return Comparison(
        old.environment,
        new.environment,
        drift,
        len(peers),
        tuple(sorted((f for f in found if isinstance(f, Change)), key=lambda change: -change.ratio)),
        tuple(sorted((f for f in found if isinstance(f, Unclear)), key=lambda row: not row.broken)),
        tuple(row.case for key, row in before.items() if key not in after),
        tuple(row.case for key, row in after.items() if key not in before),
    )


def _compare_row(old: Row, new: Row, drift: float) -> Change | Unclear:
    a, b = old.candidates[0], new.candidates[0]
    times = _times(a, b)
    if times is None:
        broken = [words.reason(each, row) for each, row in ((b, new), (a, old)) if each.status != "ok"]
        return Unclear(new.case, words.state(a), words.state(b), (*broken, "timed otherwise")[0])
    timing, before, after = times
    ratio = after.median / before.median / drift
    apart = after.low / drift > before.high or after.high / drift < before.low
    verdict: Literal["slower", "faster", "same"] = "same"
    if apart and not 1 / (1 + THRESHOLD) <= ratio <= 1 + THRESHOLD:
        verdict = "slower" if ratio > 1 else "faster"
    return Change(new.case, timing, before, after, ratio, verdict)


def _peer_ratios(old: Row, new: Row) -> list[float]:
    """New / old of every peer that is the same in both."""
    before = {(peer.name, peer.setting): peer for peer in old.candidates[1:]}
    same = [(before[key], peer) for peer in new.candidates[1:] if (key := (peer.name, peer.setting)) in before]
    return [times[2].median / times[1].median for a, b in same if (times := _times(a, b))]


def _times(old: Candidate, new: Candidate) -> tuple[str, Spread, Spread] | None:
    if old.status != "ok" or new.status != "ok":
        return None
    timing = common_timing(old, new)
    return (timing, spread(old.samples[timing]), spread(new.samples[timing])) if timing else None


def show(comparison: Comparison, to: Console | None = None) -> None:
    """Print it, the bad news first."""
    to, c = to or console(), comparison
    to.print(pairs(_header(c)))
    for row in c.unclear:
        text = Text("broken" if row.broken else "not compared", style="bold red" if row.broken else "yellow")
        to.print(text.append(f"  {_name(row.case)}: {row.old} → {row.new}: {row.reason}", style="not bold default"))
    changed = [change for change in c.changes if change.verdict != "same"]
    if changed:
        caption = f"change of the median, drift taken out; the same within {THRESHOLD:.0%} or if 95 % intervals overlap"
        columns = ["layer", "timing", "verdict", "old µs", "new µs", "change"]
        table = new_table("gpukern's times", caption, columns, left=3)
        for change in changed:
            times = (f"{words.micro(s.median)} {words.plus_minus(s)}" for s in (change.old, change.new))
            style = _COLOURS[change.verdict]
            delta = Text(f"{change.ratio - 1:+.1%}", style=style)
            table.add_row(Text(_name(change.case)), change.timing, Text(change.verdict, style=style), *times, delta)
        to.print(table)
    for name, cases in (("only in the old run", c.only_old), ("only in the new run", c.only_new)):
        for case in cases:
            to.print(Text(f"{name}  {_name(case)}"))
    verdicts = [change.verdict for change in c.changes]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("slower", "faster", "same"))
    to.print(Text(f"{counts}, {len(c.broken)} broken", style="bold red" if c.worse else "bold green"))


def _header(c: Comparison) -> list[tuple[str, str]]:
    drift = "unknown: no peer is in both, so a slower machine looks like slower code"
    if c.drift_samples:
        drift = f"{c.drift - 1:+.1%} over {words.count(c.drift_samples, 'time')} of unchanged peers"
    lines = [
        ("device", c.new.device),
        ("old", f"{words.commit_name(c.old)}, {c.old.date}"),
        ("new", f"{words.commit_name(c.new)}, {c.new.date}"),
        ("drift", drift),
    ]
    return lines + [(f"differs: {name}", change) for name, change in words.setup_changes(c.old, c.new)]


def _name(case: Case) -> str:
    return f"{words.group_title(group_key(case))} · {words.case_name(case)}"
