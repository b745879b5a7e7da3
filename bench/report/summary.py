"""Statistics of a run: ratios, wins, means, and distances from the device's limit. Nothing is printed here.

A ratio is always the peer's time / gpukern's time: above 1 gpukern is faster. Losers come first.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from bench.report import TIMINGS, adds_up, reason, state
from bench.results import Candidate, Case, Ceilings, Results, Row
from bench.stats import Spread, geometric_mean, ratio, spread

BEST = "best peer"


Outcome = Literal["win", "loss", "tie"]


def outcome(ratio: Spread | None) -> Outcome | None:
    """A tie: the 95 % interval of the ratio holds 1."""
    if ratio is None:
        return None
    return "win" if ratio.low > 1 else "loss" if ratio.high < 1 else "tie"


class GroupKey(NamedTuple):
    suite: str
    computation: str
    dtype: str
    layout: str
    batch: int


@dataclass(frozen=True)
class Versus:
    """A peer beside gpukern on one row, both timed the same way."""

    candidate: Candidate
    timing: str | None
    ours: Spread | None
    time: Spread | None
    #: None unless both are ok and were timed in the same rounds.
    ratio: Spread | None

    @property
    def outcome(self) -> Outcome | None:
        return outcome(self.ratio)

    @property
    def median(self) -> float:
        """That of the ratio, where there is one."""
        assert self.ratio is not None
        return self.ratio.median

    @property
    def times(self) -> tuple[float, float]:
        """The medians of gpukern and of the peer, where there is a ratio."""
        assert self.ours is not None and self.time is not None
        return self.ours.median, self.time.median


@dataclass(frozen=True)
class Line:
    """One row. Without a time where gpukern itself is not ok."""

    row: Row
    timing: str | None
    time: Spread | None
    peers: tuple[Versus, ...]
    #: The fastest peer that is ok, by ratio: some may be timed otherwise than others, and none may hide behind that.
    best: Versus | None
    #: Nothing on this device is faster, and what keeps it from that; None without a measured rate.
    floor_us: float | None
    bound: Literal["memory", "compute"] | None

    @property
    def ours(self) -> Candidate:
        return self.row.candidates[0]

    @property
    def share(self) -> float | None:
        """Share of the limit that is reached; 1 cannot be beaten."""
        return self.floor_us / self.time.median if self.time and self.floor_us is not None else None

    @property
    def flops_rate(self) -> float | None:
        return self.row.flops / self.time.median * 1e6 if self.time and self.row.flops else None

    @property
    def bandwidth(self) -> float | None:
        return self.row.bytes / self.time.median * 1e6 if self.time else None


@dataclass(frozen=True)
class Tally:
    """gpukern against one peer over many rows. ``absent``: rows where there is no ratio to it."""

    name: str
    mean: float | None
    wins: int
    losses: int
    ties: int
    absent: int

    @property
    def rows(self) -> int:
        return self.wins + self.losses + self.ties


@dataclass(frozen=True)
class Total:
    """Σ count · time over a network's layers in a group; ``covered`` of ``layers`` have a time of both."""

    network: str
    peer: str
    layers: int
    covered: int
    ours_us: float
    peer_us: float


@dataclass(frozen=True)
class Problem:
    """A candidate's message, and its rows: why it is not ok, or a "note" if it is."""

    name: str
    status: str
    reason: str
    #: Whether it is a problem of gpukern itself, not a mere note.
    ours: bool
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Group:
    key: GroupKey
    lines: tuple[Line, ...]
    #: Against the best peer first, then against each.
    tallies: tuple[Tally, ...]
    totals: tuple[Total, ...]
    problems: tuple[Problem, ...]

    @property
    def timing(self) -> str | None:
        """Return the timing of most rows; a report marks rows that differ."""
        return Counter(line.timing for line in self.lines if line.time).most_common(1)[0][0] if self.ok else None

    @property
    def ok(self) -> int:
        return sum(line.time is not None for line in self.lines)

    @property
    def broken(self) -> int:
        return len(self.lines) - self.ok

    @property
    def peers(self) -> tuple[str, ...]:
        return tuple(tally.name for tally in self.tallies[1:])

    def timing_of(self, peer: str) -> str | None:
        """Return the timing of most rows of this peer; None if it has no time at all."""
        found = Counter(v.timing for line in self.lines for v in line.peers if v.candidate.name == peer and v.time)
        return found.most_common(1)[0][0] if found else None

    def totals_of(self, network: str) -> dict[str, Total]:
        return {total.peer: total for total in self.totals if total.network == network}

    @property
    def networks(self) -> list[str]:
        return list(dict.fromkeys(total.network for total in self.totals))


def common_timing(*candidates: Candidate) -> str | None:
    """The most exact way in which all of them were timed."""
    return next((t for t in TIMINGS if all(c.samples.get(t) for c in candidates)), None)


def summarize(results: Results) -> list[Group]:
    """Groups and, in each, rows: what is not ok first, then ascending by the ratio to the best peer."""
    by_key: dict[GroupKey, list[Line]] = defaultdict(list)
    for row in results.rows:
        by_key[group_key(row.case)].append(line_of(row, results.ceilings))
    groups = []
    for key, lines in by_key.items():
        lines.sort(key=_rank)
        groups.append(Group(key, tuple(lines), tallies(lines), tuple(_totals(lines)), tuple(_problems(lines))))
    return sorted(groups, key=lambda group: group.tallies[0].mean or 0)


def group_key(case: Case) -> GroupKey:
    return GroupKey(case.suite, case.computation, case.dtype, case.layout, case.batch)


def line_of(row: Row, ceilings: Ceilings) -> Line:
    ours = row.candidates[0]
    timing = common_timing(ours) if ours.status == "ok" else None
    peers = tuple(_versus(ours, peer) for peer in row.candidates[1:])
    # Our own other ways are rows of the table and no peers.
    compared = [peer for peer in peers if peer.ratio and not peer.candidate.name.startswith("gpukern")]
    best = min(compared, key=lambda peer: peer.median, default=None)
    return Line(row, timing, spread(ours.samples[timing]) if timing else None, peers, best, *_floor(row, ceilings))


def tallies(lines: Sequence[Line]) -> tuple[Tally, ...]:
    """Over rows where gpukern is ok: against the best peer of each row, then against every peer by name."""
    ok = [line for line in lines if line.time]
    peers: dict[str, list[Versus | None]] = {BEST: [line.best for line in ok]}
    for line in lines:
        for peer in line.peers:
            found = peers.setdefault(peer.candidate.name, [])
            if line.time:
                found.append(peer)
    return tuple(_tally(name, found) for name, found in peers.items())


def _rank(line: Line) -> tuple[int, float]:
    if line.time is None:
        return 0, 0.0
    return (1, line.best.median) if line.best else (2, 0.0)


def _versus(ours: Candidate, peer: Candidate) -> Versus:
    if peer.status != "ok":
        return Versus(peer, None, None, None, None)
    timing = common_timing(ours, peer) if ours.status == "ok" else None
    if timing is None:
        alone = common_timing(peer)
        return Versus(peer, alone, None, spread(peer.samples[alone]) if alone else None, None)
    a, b = ours.samples[timing], peer.samples[timing]
    # Samples of different rounds have no pairs, and a quotient of medians would pass for what it is not.
    return Versus(peer, timing, spread(a), spread(b), ratio(a, b) if len(a) == len(b) else None)


def _floor(row: Row, ceilings: Ceilings) -> tuple[float | None, Literal["memory", "compute"] | None]:
    if row.flops and row.kind not in ceilings.matrix_rates:
        return None, None
    compute = row.flops / ceilings.matrix_rates[row.kind] * 1e6 if row.flops else 0.0
    memory = row.bytes / ceilings.bandwidth * 1e6
    return max(compute, memory), "compute" if compute > memory else "memory"


def _tally(name: str, found: Sequence[Versus | None]) -> Tally:
    compared = [peer for peer in found if peer and peer.ratio]
    outcomes = Counter(peer.outcome for peer in compared)
    mean = geometric_mean(peer.median for peer in compared) if compared else None
    return Tally(name, mean, outcomes["win"], outcomes["loss"], outcomes["tie"], len(found) - len(compared))


def _totals(lines: Iterable[Line]) -> Iterable[Total]:
    """Return the totals over layers: a whole network's row is its own sum, and times of several steps have none."""
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0, 0.0, 0.0])
    for line in lines:
        if not adds_up(line.row.case):
            continue
        for use in line.row.case.uses:
            for peer in line.peers:
                entry = sums[use.network, peer.candidate.name]
                entry[0] += use.count
                if peer.ratio:
                    times = peer.times
                    entry[1:] = entry[1] + use.count, entry[2] + use.count * times[0], entry[3] + use.count * times[1]
    for (network, name), (layers, covered, ours, theirs) in sorted(sums.items(), key=lambda item: item[0][0]):
        yield Total(network, name, int(layers), int(covered), ours, theirs)


def _problems(lines: Iterable[Line]) -> Iterable[Problem]:
    found: dict[tuple[str, str, str, bool], list[Case]] = defaultdict(list)
    for line in lines:
        for candidate in line.row.candidates:
            ok = state(candidate) == "ok"
            if not ok or candidate.message:
                status, ours = "note" if ok else state(candidate), not ok and candidate is line.ours
                found[candidate.name, status, reason(candidate, line.row), ours].append(line.row.case)
    return [Problem(*key, tuple(cases)) for key, cases in found.items()]
