"""Scales of the page's charts, and what is drawn on them.

A scale gives percentages of the chart's width or height, so that it fits any screen. The template draws with its own
colours; nothing here depends on the time or the machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench import report as words
from bench.report.summary import Line
from bench.results import Ceilings

#: Ratios beyond this are drawn at the edge; their number is beside them.
_WIDEST = 32.0
#: Ticks of the bars by where the axis ends.
_MARKS = (
    (1.4, (0.8, 0.9, 1, 1.1, 1.25)),
    (2.1, (0.5, 0.67, 1, 1.5, 2)),
    (5.0, (0.25, 0.5, 0.67, 1, 1.5, 2, 4)),
    (10.0, (0.25, 0.5, 1, 2, 4)),
    (math.inf, (1 / 16, 0.25, 1, 4, 16)),
)


@dataclass(frozen=True)
class Scale:
    """Logarithmic, from ``low`` at 0 % to ``high`` at 100 %."""

    low: float
    high: float

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(100 * min(1.0, max(0.0, share)), 2)

    def down(self, value: float) -> float:
        """Return a position from the top, as in pictures."""
        return round(100 - self.at(value), 2)

    def span(self, a: float, b: float) -> tuple[float, float]:
        """Return where a bar between two values begins, and its width."""
        left, right = sorted((self.at(a), self.at(b)))
        return left, round(right - left, 2)

    def ticks(self) -> list[tuple[float, str]]:
        """(value, label) of round numbers; powers of ten alone where more would not fit."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            values = [v for d in decades for s in steps if self.low <= (v := s * 10.0**d) <= self.high]
            if len(values) <= 7:
                break
        return [(value, f"{value:,.12g}") for value in values]


def around_one(ratios: Iterable[float], margin: float) -> Scale:
    """Return a scale that ``ratios`` fit on, with 1.0 in the middle, so that twice and half look alike."""
    limit = min(_WIDEST, max(max(ratio, 1 / ratio) for ratio in (1.25, *ratios)) * margin)
    return Scale(1 / limit, limit)


def ratio_ticks(scale: Scale) -> list[tuple[float, str]]:
    """Return (value, label) for a scale of :func:`around_one`."""
    marks = next(found for upper, found in _MARKS if scale.high < upper)
    return [(mark, f"{mark:.3g}×") for mark in marks if scale.low <= mark <= scale.high]


def bars(lines: Iterable[Line]) -> Scale | None:
    """Return the scale of the bars from 1.0 to the ratio to the best peer; None if no row has one."""
    ends = [end for line in lines if line.best and (ratio := line.best.ratio) for end in (ratio.low, ratio.high)]
    return around_one(ends, 1.03) if ends else None


@dataclass(frozen=True)
class Dot:
    """A row: its FLOP/byte, gpukern's TFLOP/s and, where there is one, the best peer's, timed alike."""

    line: Line
    intensity: float
    rate: float
    peer_rate: float | None


@dataclass(frozen=True)
class Ceiling:
    """A straight line between two points of FLOP/byte and TFLOP/s."""

    label: str
    start: tuple[float, float]
    end: tuple[float, float]


@dataclass(frozen=True)
class Roofline:
    x: Scale
    y: Scale
    ceilings: list[Ceiling]
    dots: list[Dot]
    #: Rows that have no arithmetic, and so no place here.
    left_out: int


def roofline(lines: Sequence[Line], ceilings: Ceilings) -> Roofline | None:
    """FLOP/byte against TFLOP/s, below what a copy and a matrix product reach; None without arithmetic."""
    timed = [line for line in lines if line.time]
    dots = [_dot(line) for line in timed if line.row.flops and line.row.bytes]
    if not dots:
        return None
    kinds = {dot.line.row.kind for dot in dots}
    rates = {kind: rate / 1e12 for kind, rate in ceilings.matrix_rates.items() if kind in kinds}
    # A byte a second is a FLOP a second at 1 FLOP/byte.
    slope = ceilings.bandwidth / 1e12
    x = _around([dot.intensity for dot in dots] + [rate / slope for rate in rates.values()])
    y = _around([rate for dot in dots for rate in (dot.rate, dot.peer_rate) if rate] + list(rates.values()))
    top = max(rates.values(), default=y.high)
    start, end = max(x.low, y.low / slope), min(x.high, top / slope)
    copy = Ceiling(f"copy {words.rate(ceilings.bandwidth, 1e9)} GB/s", (start, start * slope), (end, end * slope))
    products = [
        Ceiling(f"{kind} {words.rate(rate, 1)} TFLOP/s", (rate / slope, rate), (x.high, rate))
        for kind, rate in rates.items()
    ]
    return Roofline(x, y, [copy, *products], dots, len(timed) - len(dots))


def _dot(line: Line) -> Dot:
    intensity, flops = line.row.flops / line.row.bytes, line.row.flops / 1e6
    if line.best:
        ours, theirs = line.best.times
        return Dot(line, intensity, flops / ours, flops / theirs)
    assert line.time is not None
    return Dot(line, intensity, flops / line.time.median, None)


def _around(values: Sequence[float]) -> Scale:
    return Scale(min(values) / 1.5, max(values) * 1.6)
