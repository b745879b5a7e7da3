"""Report of a tuning run."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gpukern.conv import Entry
from gpukern.formatting import count, micro, number, ratio

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Result:
    """One problem. ``before``: whether an earlier run measured it."""

    name: str
    entry: Entry
    before: bool = False

    @property
    def speedup(self) -> float | None:
        """Speedup over the planner's choice; None if one of the two has no time."""
        entry = self.entry
        if not entry.microseconds or not entry.heuristic_microseconds:
            return None
        return entry.heuristic_microseconds / entry.microseconds

    def __str__(self) -> str:
        entry = self.entry
        if entry.plan is None:
            return f"no plan is right, {len(entry.rejected)} rejected"
        if self.speedup is None:
            return f"{entry.plan}, {_time(entry.microseconds)}; the planner's choice is not right"
        gain = "the planner's choice" if entry.plan == entry.heuristic else f"{number(self.speedup)} times as fast"
        return f"{entry.plan}, {_time(entry.microseconds)}, {gain}"


@dataclass
class Report:
    """Contents of ``path`` now: each requested problem, except those in ``left``, for which there was no time.

    ``failed``: problems that could not be measured at all, and why.
    """

    path: Path
    results: list[Result] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    left: int = 0

    @property
    def speedup(self) -> float | None:
        """The geometric mean over the problems; None without one."""
        gains = [result.speedup for result in self.results if result.speedup]
        return statistics.geometric_mean(gains) if gains else None

    @property
    def rejected(self) -> dict[str, int]:
        """Reason → how many plans were rejected for it, in all problems of this run."""
        counts: dict[str, int] = {}
        for result in self.results:
            if not result.before:
                for _, reason in result.entry.rejected:
                    counts[reason] = counts.get(reason, 0) + 1
        return dict(sorted(counts.items(), key=lambda count: -count[1]))

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        parts: list[RenderableType] = [self._table()] if self.results else []
        parts += [Text(line, style="yellow") for line in self._complaints()]
        return Group(*parts, Text(f"plans are in {self.path}"))

    def _table(self) -> RenderableType:
        from rich.text import Text

        from gpukern.tables import Column, numbers, table

        problem, gained = Column("problem", False, "geometric mean"), Column("speed-up", total=ratio(self.speedup))
        made = table(problem, *numbers("planned", "tuned"), gained, "plan")
        for result in self.results:
            entry, gain = result.entry, result.speedup
            made.add_row(
                Text(result.name + (" (measured before)" if result.before else "")),
                _time(entry.heuristic_microseconds),
                _time(entry.microseconds),
                ratio(gain),
                str(entry.plan or "none is right"),
                style="green" if gain and gain > 1 else "",
            )
        return made

    def _complaints(self) -> list[str]:
        lines = [f"not measured: {name}: {reason}" for name, reason in self.failed]
        lines += [f"rejected {count(times, 'plan')}: {reason}" for reason, times in self.rejected.items()]
        if self.left:
            lines.append(f"no time was left for {self.left} of the problems; the same command again goes on with them")
        return lines

    def __str__(self) -> str:
        from gpukern.tables import as_text

        return as_text(self)


def _time(microseconds: float | None) -> str:
    return micro(None if microseconds is None else microseconds * 1e-6)
