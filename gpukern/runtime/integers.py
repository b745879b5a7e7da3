"""Integer arithmetic of launch plans and problems. Imports neither torch nor Triton."""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """Return ``a / b`` rounded up."""
    return -(-a // b)


def shares(total: int, parts: int) -> list[int]:
    """Divide ``total`` into equal parts. Rounded up, they can leave little for the last ones, or nothing."""
    share = cdiv(total, parts)
    return [min(share, max(total - i * share, 0)) for i in range(parts)]


def power_of_two(value: int, low: int = 1, high: int | None = None) -> int:
    """Return the smallest power of two that is at least ``value``, clamped to ``low`` and ``high``."""
    power = max(1 << max(value - 1, 0).bit_length(), low)
    return power if high is None else min(power, high)


def require(condition: bool, message: str) -> None:
    """Raise RuntimeError, torch's error for sizes that do not fit together, unless ``condition``."""
    if not condition:
        raise RuntimeError(message)
