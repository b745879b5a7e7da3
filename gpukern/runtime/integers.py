"""The integer arithmetic of launch plans and problems. No torch, no Triton."""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def shares(total: int, parts: int) -> list[int]:
    """``total`` in equal parts. Rounded up, they can leave little for the last ones, or nothing."""
    share = cdiv(total, parts)
    return [min(share, max(total - i * share, 0)) for i in range(parts)]


def power_of_two(value: int, low: int = 1, high: int | None = None) -> int:
    """The smallest power of two that is at least ``value``, held between ``low`` and ``high``."""
    power = max(1 << max(value - 1, 0).bit_length(), low)
    return power if high is None else min(power, high)


def require(condition: bool, message: str) -> None:
    """Raise RuntimeError, torch's error for sizes that do not fit together, unless ``condition``."""
    if not condition:
        raise RuntimeError(message)
