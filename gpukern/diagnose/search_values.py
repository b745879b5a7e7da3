"""What a search finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from gpukern.diagnose.space import Choice, Range, Space
from gpukern.formatting import brief


@dataclass(frozen=True)
class Run:
    """One training: its ``settings``, its last ``value``, and the value after each step that it reported.

    ``state``: "pruned" was ended early because others were better, "failed" returned NaN.
    """

    round: int
    number: int
    settings: dict[str, Any]
    value: float | None
    state: Literal["complete", "pruned", "failed"]
    curve: tuple[float, ...] = ()


@dataclass(frozen=True)
class SearchValues:
    """All runs in their order; ``space`` is that of the first round, ``rounds`` has the narrower ones behind it."""

    runs: tuple[Run, ...]
    space: Space
    rounds: tuple[Space, ...]
    maximize: bool = False
    notes: tuple[str, ...] = field(default=())

    @property
    def ranked(self) -> tuple[Run, ...]:
        """The complete runs, the best first."""
        found = [run for run in self.runs if run.state == "complete" and run.value is not None]
        return tuple(sorted(found, key=lambda run: run.value or 0.0, reverse=self.maximize))

    @property
    def best(self) -> Run | None:
        """The best complete run; None if none is complete."""
        return next(iter(self.ranked), None)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Where the best lies on the border of its range: the optimum may lie beyond."""
        best = self.best
        if best is None:
            return ()
        told = []
        for name, each in self.space.items():
            if isinstance(each, Choice):
                continue
            side = each.border(best.settings[name])
            if side:
                told.append(_border(name, each, best.settings[name], side))
        return tuple(told)


def _border(name: str, space: Range, value: float, side: str) -> str:
    what = "below" if side == "lower" else "above"
    end = space.low if side == "lower" else space.high
    return f"the best {name}, {brief(value)}, lies on the {side} border of its range: search {what} {brief(end)} too"
