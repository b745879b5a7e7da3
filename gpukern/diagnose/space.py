"""Ranges of hyperparameters, and how they narrow around the best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: The share of a range's width at either end that counts as its border.
BORDER = 0.1


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, drawn uniformly, or uniformly in the logarithm; ``integer``: whole ones."""

    low: float
    high: float
    log: bool = False
    integer: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"a range goes from a smaller to a larger number, got {self.low} to {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range begins above 0, got {self.low}")
        if self.integer and (self.low != int(self.low) or self.high != int(self.high)):
            raise ValueError(f"a range of whole numbers has whole ends, got {self.low} to {self.high}")

    def place(self, value: float) -> float:
        """Where ``value`` lies, from 0 (``low``) to 1 (``high``), by the logarithm if drawn so."""
        low, high, value = (math.log(each) if self.log else each for each in (self.low, self.high, value))
        return (value - low) / (high - low)

    def at(self, place: float) -> float:
        """The value at a ``place`` of 0 to 1."""
        if place <= 0 or place >= 1:
            return self.low if place <= 0 else self.high
        if self.log:
            return math.exp(math.log(self.low) + place * math.log(self.high / self.low))
        return self.low + place * (self.high - self.low)

    def narrowed(self, value: float, share: float) -> Range:
        """A range of ``share`` of this one's width around ``value``, within this one."""
        middle = self.place(value)
        low = min(max(middle - share / 2, 0.0), 1.0 - share)
        ends = self.at(low), self.at(low + share)
        if self.integer:
            # But for rounding: 16 may be 15.999….
            ends = float(math.floor(ends[0] + 1e-9)), float(math.ceil(ends[1] - 1e-9))
        return Range(ends[0], ends[1], self.log, self.integer) if ends[0] < ends[1] else self

    def border(self, value: float) -> str:
        """ "lower" or "upper" if ``value`` lies there, "" if between."""
        place = self.place(value)
        return "lower" if place < BORDER else "upper" if place > 1 - BORDER else ""


@dataclass(frozen=True)
class Choice:
    """One of several values: numbers, text, True, False or None."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.values or not all(isinstance(each, (int, float, str, type(None))) for each in self.values):
            raise ValueError(f"a choice is of numbers, text, True, False or None, got {self.values!r}")


Space = Mapping[str, "Range | Choice"]


def log_uniform(low: float, high: float) -> Range:
    """Numbers from ``low`` to ``high`` whose logarithm is uniform: learning rates, weight decays.

    ValueError where ``low`` is not above 0 and below ``high``.
    """
    return Range(low, high, log=True)


def uniform(low: float, high: float) -> Range:
    """Numbers between ``low`` and ``high``: a dropout probability."""
    return Range(low, high)


def integers(low: int, high: int, *, log: bool = False) -> Range:
    """Whole numbers from ``low`` to ``high``, both included: layers, channels. ``log``: as :func:`log_uniform`."""
    return Range(low, high, log=log, integer=True)


def choice(*values: Any) -> Choice:
    """One of ``values``."""
    return Choice(values)
