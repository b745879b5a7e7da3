"""Positions of the marks in the page's charts: percentages of their width and height, so that they fit any screen.

The template draws them with its own colours; nothing here depends on the time or the machine.
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

    def ticks(self, steps: Sequence[float] = (1, 2, 5), at_most: int = 7) -> list[tuple[float, str]]:
        """(place, label) of round numbers; powers of ten alone where more would not fit."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for chosen in (steps, (1, 3), (1,)):
            values = [v for d in decades for s in chosen if self.low <= (v := s * 10.0**d) <= self.high]
            if len(values) <= at_most:
                break
        return [(self.at(value), f"{value:,.12g}") for value in values]


@dataclass(frozen=True)
class Bar:
    """A bar from 1.0 to the ratio to the best peer, and the ratio's interval."""

    line: Line
    left: float
    width: float
    whisker_left: float
    whisker_width: float


@dataclass(frozen=True)
class Bars:
    ticks: list[tuple[float, str]]
    bars: list[Bar]


def bars(lines: Iterable[Line]) -> Bars:
    """Return the bars of rows with a ratio, in order. 1.0 is in the middle, so that twice and half look alike."""
    compared = [(line, line.best.ratio) for line in lines if line.best and line.best.ratio]
    ends = [max(ratio.high, 1 / ratio.low) for _, ratio in compared]
    limit = min(_WIDEST, max([1.25, *ends]) * 1.03)
    scale = Scale(1 / limit, limit)
    marks = next(found for upper, found in _MARKS if limit < upper)
    made = []
    for line, ratio in compared:
        low, middle, high = map(scale.at, (ratio.low, ratio.median, ratio.high))
        made.append(Bar(line, min(middle, 50.0), round(abs(middle - 50), 2), low, round(high - low, 2)))
    return Bars([(scale.at(mark), f"{mark:.3g}×") for mark in marks if 1 / limit <= mark <= limit], made)


@dataclass(frozen=True)
class Dot:
    """A row: gpukern's rate and, where there is one, the best peer's, timed alike."""

    line: Line
    x: float
    y: float
    rate: float
    peer_y: float | None
    peer_rate: float | None


@dataclass(frozen=True)
class Ceiling:
    label: str
    ends: tuple[float, float, float, float]


@dataclass(frozen=True)
class Roofline:
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    ceilings: list[Ceiling]
    dots: list[Dot]
    #: Rows that have no arithmetic, and so no place here.
    left_out: int


def roofline(lines: Sequence[Line], ceilings: Ceilings) -> Roofline | None:
    """FLOP/byte against TFLOP/s, below what a copy and a matrix product reach; None without arithmetic."""
    timed = [line for line in lines if line.time]
    rows = [line for line in timed if line.row.flops and line.row.bytes]
    if not rows:
        return None
    found = [(line, line.row.flops / line.row.bytes, *_rates(line)) for line in rows]
    kinds = {line.row.kind for line in rows}
    rates = {kind: rate / 1e12 for kind, rate in ceilings.matrix_rates.items() if kind in kinds}
    # A byte a second is a FLOP a second at 1 FLOP/byte.
    slope = ceilings.bandwidth / 1e12
    x = _around([intensity for _, intensity, _, _ in found] + [rate / slope for rate in rates.values()])
    shown = [value for _, _, *both in found for value in both if value] + list(rates.values())
    y = _around(shown)
    top = max(rates.values(), default=y.high)
    start, end = max(x.low, y.low / slope), min(x.high, top / slope)
    made = [
        Ceiling(f"copy {words.rate(ceilings.bandwidth, 1e9)} GB/s", _line(x, y, start, start * slope, end, end * slope))
    ]
    for kind, rate in rates.items():
        ends = _line(x, y, rate / slope, rate, x.high, rate)
        made.append(Ceiling(f"{kind} {words.rate(rate, 1)} TFLOP/s", ends))
    dots = [
        Dot(line, x.at(intensity), _down(y, rate), rate, _down(y, peer) if peer else None, peer)
        for line, intensity, rate, peer in found
    ]
    return Roofline(x.ticks(), [(100 - at, label) for at, label in y.ticks()], made, dots, len(timed) - len(rows))


def _rates(line: Line) -> tuple[float, float | None]:
    """TFLOP/s of gpukern and of the best peer."""
    if line.best:
        ours, theirs = line.best.times
        return line.row.flops / ours / 1e6, line.row.flops / theirs / 1e6
    assert line.time is not None
    return line.row.flops / line.time.median / 1e6, None


def _around(values: Sequence[float]) -> Scale:
    return Scale(min(values) / 1.5, max(values) * 1.6)


def _down(scale: Scale, value: float) -> float:
    """Return a position from the top, as in pictures."""
    return round(100 - scale.at(value), 2)


def _line(x: Scale, y: Scale, x1: float, y1: float, x2: float, y2: float) -> tuple[float, float, float, float]:
    return x.at(x1), _down(y, y1), x.at(x2), _down(y, y2)


@dataclass(frozen=True)
class Point:
    """A run's geometric mean against the best peer."""

    commit: str
    date: str
    mean: float
    rows: int
    x: float = 0.0
    y: float = 0.0


@dataclass(frozen=True)
class History:
    one: float
    points: list[Point]


def history(points: Sequence[Point]) -> History:
    """Oldest to newest at equal distances; ``one`` is where 1.0 lies."""
    limit = max([1.25] + [max(point.mean, 1 / point.mean) for point in points]) * 1.1
    scale = Scale(1 / limit, limit)
    last = max(1, len(points) - 1)
    placed = [
        Point(p.commit, p.date, p.mean, p.rows, round(5 + 90 * i / last, 2), _down(scale, p.mean))
        for i, p in enumerate(points)
    ]
    return History(_down(scale, 1.0), placed)
