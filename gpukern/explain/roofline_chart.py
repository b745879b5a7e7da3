"""The roofline in characters: what a device attains at each intensity, both on logarithmic scales.

See :mod:`gpukern.runtime.roofline`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpukern import formatting

WIDTH, HEIGHT = 64, 12


@dataclass(frozen=True)
class Point:
    """``intensity`` in FLOP per byte, ``rate`` in FLOP/s."""

    mark: str
    intensity: float
    rate: float


def chart(rate: float, bandwidth: float, points: list[Point], width: int = WIDTH, height: int = HEIGHT) -> list[str]:
    """Lines of text: the roof min(``rate``, intensity · ``bandwidth``) and the points below it, the first on top.

    Points without a positive intensity and rate have no place on logarithmic scales and are left out.
    """
    points = [point for point in points if point.intensity > 0 and point.rate > 0]
    ridge = rate / bandwidth
    intensities = [ridge, *(point.intensity for point in points)]
    left, right = math.log2(min(intensities) / 4), math.log2(max(intensities) * 4)
    top = math.log2(rate)
    bottom = min(math.log2(2**left * bandwidth), *(math.log2(point.rate) for point in points), top - 4)

    def column(intensity: float) -> int:
        return round((math.log2(intensity) - left) / (right - left) * (width - 1))

    def row(value: float) -> int:
        return round((top - max(math.log2(value), bottom)) / (top - bottom) * (height - 1))

    cells = [[" "] * width for _ in range(height)]
    for x in range(width):
        intensity = 2 ** (left + (right - left) * x / (width - 1))
        cells[row(min(rate, intensity * bandwidth))][x] = "─" if intensity >= ridge else "/"
    for point in reversed(points):
        cells[row(point.rate)][column(point.intensity)] = point.mark
    return [*_with_rates(cells, top, bottom), *_axis(left, right, width)]


def _with_rates(cells: list[list[str]], top: float, bottom: float) -> list[str]:
    """Label every third line with its rate in TFLOP/s."""
    last = len(cells) - 1
    lines = []
    for number, line in enumerate(cells):
        value = 2 ** (top - (top - bottom) * number / last) / 1e12
        label = f"{formatting.number(value, 2):>7}" if number % 3 == 0 or number == last else " " * 7
        lines.append(f"{label} ┤{''.join(line)}".rstrip())
    return lines


def _axis(left: float, right: float, width: int) -> list[str]:
    """The scale of intensities: powers of four where they fit."""
    line, labels = ["─"] * width, [" "] * (width + 8)
    free = 0
    for power in range(math.ceil(left / 2) * 2, math.floor(right) + 1, 2):
        at, words = round((power - left) / (right - left) * (width - 1)), formatting.tick(2.0**power)
        line[at] = "┴"
        if at >= free:
            labels[at : at + len(words)] = words
            free = at + len(words) + 1
    return [" " * 8 + "└" + "".join(line), " " * 9 + "".join(labels).rstrip() + " FLOP/byte"]
