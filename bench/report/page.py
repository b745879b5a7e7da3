"""Runs as one self-contained HTML page: a section for each device."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import report as words
from bench.report import plots, throughput
from bench.report.summary import Group, GroupKey, Tally, summarize, tallies
from bench.results import Environment, Results
from gpukern import pages


@dataclass(frozen=True)
class Run:
    path: Path
    results: Results
    groups: list[Group]

    @property
    def suites(self) -> list[str]:
        return list(dict.fromkeys(row.case.suite for row in self.results.rows))


@dataclass(frozen=True)
class History:
    """Each run's tally against the best peer of each row, oldest first."""

    scale: plots.Scale
    points: list[tuple[Environment, Tally]]


@dataclass(frozen=True)
class GroupView:
    """A group of the newest run of its suite, with what earlier runs had of it."""

    group: Group
    run: Run
    anchor: str
    bars: plots.Scale | None
    roofline: plots.Roofline | None
    history: History | None


@dataclass(frozen=True)
class Device:
    name: str
    #: Those that are the newest of a suite; the tables are theirs.
    runs: list[Run]
    tallies: tuple[Tally, ...]
    groups: list[GroupView]
    #: (old commit, new commit, name, change) wherever the setup changed between two runs of the history.
    setup_changes: list[tuple[str, str, str, str]]


def render(files: Sequence[tuple[Path, Results]]) -> str:
    """The page; the same files give the same bytes."""
    return pages.render(
        Path(__file__).with_name("page.html"), words=words, plots=plots, throughput=throughput, devices=_devices(files)
    )


def _devices(measured: Sequence[tuple[Path, Results]]) -> list[Device]:
    by_device: dict[str, list[Run]] = defaultdict(list)
    for path, results in sorted(measured, key=lambda file: (file[1].environment.date, str(file[0]))):
        by_device[results.environment.device].append(Run(path, results, summarize(results)))
    return [_device(name, runs, f"d{index}") for index, (name, runs) in enumerate(sorted(by_device.items()))]


def _device(name: str, runs: list[Run], anchor: str) -> Device:
    newest = {suite: run for run in runs for suite in run.suites}
    shown = [(group, run) for run in runs for group in run.groups if newest[group.key.suite] is run]
    shown.sort(key=lambda pair: pair[0].tallies[0].mean or 0)
    views = [
        GroupView(
            group,
            run,
            f"{anchor}-g{index}",
            plots.bars(group.lines),
            plots.roofline(group.lines, run.results.ceilings),
            _history(group.key, runs),
        )
        for index, (group, run) in enumerate(shown)
    ]
    changes = []
    for before, after in itertools.pairwise(run.results.environment for run in runs):
        names = words.commit_name(before), words.commit_name(after)
        # The code is meant to change from run to run.
        changes += [(*names, *c) for c in words.setup_changes(before, after) if c[0] not in ("source", "gpukern")]
    everything = tallies([line for group, _ in shown for line in group.lines])
    current = [run for run in runs if any(run is one for one in newest.values())]
    return Device(name, current, everything, views, changes)


def _history(key: GroupKey, runs: Sequence[Run]) -> History | None:
    """Return the history; None for a single run, which the tables show."""
    found = ((run.results.environment, group.tallies[0]) for run in runs for group in run.groups if group.key == key)
    points = [(environment, best) for environment, best in found if best.mean]
    return History(plots.around_one((best.mean or 1.0 for _, best in points), 1.1), points) if points[1:] else None
