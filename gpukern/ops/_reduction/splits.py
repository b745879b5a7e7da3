"""Split counts of sums over pixels. Imports neither torch nor Triton."""

from __future__ import annotations

from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.integers import cdiv


def pixel_splits(pixels: int, block_k: int, programs: int, device: DeviceSpec) -> int:
    """Return enough splits for two waves, each of at least four steps along the sum; partial sums cost traffic."""
    wanted = cdiv(2 * device.sm_count, max(programs, 1))
    return max(1, min(wanted, cdiv(pixels, 4 * block_k), 64))


def channel_sum_splits(pixels: int, channels: int, device: DeviceSpec) -> int:
    """Splits of the bias gradient, whose programs take 64 channels each."""
    return pixel_splits(pixels, 64, cdiv(channels, 64), device)
