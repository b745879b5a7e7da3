"""Whole networks as their users count: images a second, and how long one waits for a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench import report as words
from bench.report import TIMINGS
from bench.report.summary import Group, Line, Outcome, outcome
from bench.results import Candidate, Case
from bench.stats import Spread, percentile, ratio, spread
from gpukern.formatting import number

COLUMNS = ("network", "candidate", "images/s", "p50 µs", "p99 µs", "its time / gpukern's", "95 % interval")
#: How many of them are words, and which is the ratio.
WORDS, RATIO = 2, 5
#: What a reader must know of the p99.
CAPTION = "of a batch; each sample is the mean of the calls in a millisecond, or of one call that takes longer"


@dataclass(frozen=True)
class Throughput:
    """One candidate on one network, timed in one way. ``ratio`` is None without pairs of samples, as for ourselves."""

    case: Case
    candidate: str
    ours: bool
    images: float
    p50: float
    p99: float
    ratio: Spread | None

    @property
    def outcome(self) -> Outcome | None:
        return outcome(self.ratio)

    @property
    def cells(self) -> list[str]:
        """The cells of :data:`COLUMNS`."""
        times = words.micro(self.p50), words.micro(self.p99)
        compared = (words.ratio(self.ratio.median), words.interval(self.ratio)) if self.ratio else ("–", "–")
        name = words.one_line(self.candidate)
        return [words.case_name(self.case), name, number(self.images), *times, *compared]


def throughputs(group: Group) -> list[tuple[str, list[Throughput]]]:
    """A table for each way of timing, named in words; none for a group whose rows are no networks."""
    lines = [line for line in group.lines if words.is_network(line.row.case)]
    tables = [(TIMINGS[timing], [each for line in lines for each in _timed(line, timing)]) for timing in TIMINGS]
    return [(title, rows) for title, rows in tables if rows]


def _timed(line: Line, timing: str) -> list[Throughput]:
    """gpukern first, then the fastest peer first."""
    case, ours, found = line.row.case, _samples(line.ours, timing), []
    for candidate in line.row.candidates:
        if theirs := _samples(candidate, timing):
            is_ours, median = candidate is line.ours, spread(theirs).median
            images, slow = words.images_per_second(case, median), percentile(theirs, 0.99)
            # Samples of different rounds have no pairs.
            paired = ratio(ours, theirs) if not is_ours and len(ours) == len(theirs) else None
            found.append(Throughput(case, candidate.name, is_ours, images, median, slow, paired))
    return sorted(found, key=lambda each: (not each.ours, -each.images))


def _samples(candidate: Candidate, timing: str) -> Sequence[float]:
    return candidate.samples.get(timing, ()) if candidate.status == "ok" else ()
