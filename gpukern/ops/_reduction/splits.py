"""Split counts of sums over pixels, and how their parts are added. Imports neither torch nor Triton."""

from __future__ import annotations

import math

from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.integers import cdiv, power_of_two

#: Sums that a program reads in the time that another round of additions takes, to store, count and wait: 128 KB in
#: 1.1 µs, see the constants of ``gpukern/conv/estimate.py``.
_ROUND = 32 * 1024


def pixel_splits(pixels: int, block_k: int, programs: int, device: DeviceSpec) -> int:
    """Return enough splits for two waves, each of at least four steps along the sum; partial sums cost traffic."""
    wanted = cdiv(2 * device.sm_count, max(programs, 1))
    return max(1, min(wanted, cdiv(pixels, 4 * block_k), 64))


def channel_sum_splits(pixels: int, channels: int, device: DeviceSpec) -> int:
    """Splits of the bias gradient, whose programs take 64 channels each."""
    return pixel_splits(pixels, 64, cdiv(channels, 64), device)


def fan_in(splits: int, size: int) -> int | None:
    """Return the number of parts, of ``size`` sums each, in a group that is added first, about √splits; None: all."""
    root = math.isqrt(splits - 1) + 1
    two_rounds = (root + cdiv(splits, root)) * size + _ROUND
    return root if two_rounds < splits * size else None


def group_count(splits: int, size: int) -> int:
    """Return the number of groups whose parts are added in a first round; none without one."""
    group = fan_in(splits, size)
    return cdiv(splits, group) if group else 0


def parts_in_turn(splits: int, size: int) -> int:
    """Return how many parts are read, one after the other, until a tile's sums are complete."""
    return (fan_in(splits, size) or splits) + group_count(splits, size)


def chunk(size: int, num_warps: int) -> int:
    """Return how many of a tile's sums a program adds at a time: at most eight a thread, two loads of 16 bytes."""
    return min(256 * num_warps, power_of_two(size))
