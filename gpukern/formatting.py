"""Formatting of numbers in all tables, pages and messages: usually three significant digits, "–" if not known."""

from __future__ import annotations

import math

#: Stands for a value that is not known.
MISSING = "–"


def decimals(value: float, significant: int = 3) -> int:
    """Return how many decimals show ``significant`` digits of ``value``; integers keep all of theirs."""
    if not math.isfinite(value) or value == 0:
        return 0
    # The exponent after rounding: 9.999 is 10.0.
    exponent = int(f"{abs(value):.{significant - 1}e}".partition("e")[2])
    return max(0, significant - 1 - exponent)


def number(value: float | None, significant: int = 3) -> str:
    """12,345 or 123 or 1.23 or 0.0123."""
    return MISSING if value is None else f"{value:,.{decimals(value, significant)}f}"


def tick(value: float) -> str:
    """A value that is round already, as on an axis: 0.25 or 1.5 or 2,048."""
    return f"{value:,.6g}"


def count(number: int, singular: str, plural: str = "") -> str:
    """1 row, 1,234 rows, 2 losses."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def seconds(value: float | None) -> str:
    """1.23 s."""
    return MISSING if value is None else f"{number(value)} s"


def milli(seconds: float | None) -> str:
    """1.23 ms."""
    return MISSING if seconds is None else f"{number(seconds * 1e3)} ms"


def micro(seconds: float | None) -> str:
    """1.23 µs."""
    return MISSING if seconds is None else f"{number(seconds * 1e6)} µs"


def size(bytes: float | None) -> str:
    """1.23 MB; below a tenth of that 12.3 kB. Decimal units, as bandwidths have them."""
    if bytes is None:
        return MISSING
    return f"{number(bytes / 1e6)} MB" if bytes >= 1e5 or bytes == 0 else f"{number(bytes / 1e3)} kB"


def memory(bytes: int | None) -> str:
    """227 KiB or 50 MiB or 139 GiB: what hardware has, in binary units and without zeros behind."""
    if bytes is None:
        return MISSING
    power = min(3, max(1, (int(bytes).bit_length() - 1) // 10))
    value = bytes / 1024**power
    return f"{round(value, decimals(value)):g} {('KiB', 'MiB', 'GiB')[power - 1]}"


def flops(count: float) -> str:
    """1.23 GFLOP; below a hundredth of that 1.23 MFLOP."""
    return f"{number(count / 1e9)} GFLOP" if count >= 1e7 else f"{number(count / 1e6)} MFLOP"


def percent(share: float | None, decimals: int = 0) -> str:
    """97% or 96.9%. Only all of it is 100%: a little less is 99.9%."""
    if share is None:
        return MISSING
    rounded = round(100 * share, decimals)
    if rounded == 100 and share < 1:
        rounded = math.floor(share * 1000) / 10
    return f"{rounded:.15g}%"


def ratio(value: float | None) -> str:
    """1.06× or 0.94× or 12.3×: a hundredth is as much as a comparison of times can resolve; 0.0123× of very little."""
    if value is None:
        return MISSING
    return f"{value:.2f}×" if 0.1 <= abs(value) < 9.995 else f"{number(value)}×"


def error(value: float | None) -> str:
    """4.1e-04: a relative error, of which the order of magnitude matters."""
    return MISSING if value is None else f"{value:.1e}"


def brief(value: float) -> str:
    """0.49 or -0.0012 or 1.2e-07: two digits, of values of any order of magnitude."""
    if value and math.isfinite(value) and not 1e-3 <= abs(value) < 1e4:
        return f"{value:.1e}"
    return f"{value:.2g}" if abs(value) < 100 or not math.isfinite(value) else f"{value:.0f}"
