"""What a sanity check finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["ok", "warning", "wrong", "not checked"]


@dataclass(frozen=True)
class Check:
    """One check: what was found, in words, and what to do about it ("" if nothing)."""

    name: str
    verdict: Verdict
    finding: str
    advice: str = ""


@dataclass(frozen=True)
class Entry:
    """One compared derivative: ``parameter`` [``place``]; ``kink``: it agrees on one side only, or very near."""

    parameter: str
    place: int
    analytic: float
    numeric: float
    error: float
    kink: bool


@dataclass(frozen=True)
class Measured:
    """Numbers behind the verdicts. ``handful``: the loss of each step; ``updates``: ‖Δθ‖/‖θ‖ by parameter."""

    handful: tuple[float, ...] = ()
    updates: dict[str, float] = field(default_factory=dict)
    derivatives: tuple[Entry, ...] = ()


@dataclass(frozen=True)
class SanityValues:
    """The checks in their order. ``passed``: none is wrong."""

    model: str
    checks: tuple[Check, ...]
    measured: Measured

    @property
    def passed(self) -> bool:
        return not any(check.verdict == "wrong" for check in self.checks)

    @property
    def findings(self) -> tuple[Check, ...]:
        """The checks that are wrong, then the warnings."""
        order: tuple[Verdict, ...] = ("wrong", "warning")
        return tuple(check for verdict in order for check in self.checks if check.verdict == verdict)

    def __getitem__(self, name: str) -> Check:
        """The check called ``name``. KeyError if there is none."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"{name!r} is no check: there are {', '.join(check.name for check in self.checks)}")
