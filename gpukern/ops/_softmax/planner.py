"""Planner of softmax and cross entropy: division into programs. Imports neither torch nor Triton.

Tiles are [rows, numbers of a row]. A row that fits the registers of a program is read once; a longer one is walked
through in several tiles, and read again for what depends on its sum.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from gpukern.ops._batch_norm.problem import Walk
from gpukern.runtime.integers import cdiv, power_of_two

#: The most numbers of a tile, 32 for each of 1,024 threads; half of it where a second tile is kept beside.
_MOST = 32 * 1024
#: Numbers of a tile of many short rows, and of a tile of a row that does not fit.
_SHORT, _LONG = 2048, 16 * 1024
#: Numbers of a thread.
_EACH = 16
#: Bytes of neighbouring rows that are read together where these are adjacent, not the numbers of a row: two sectors.
_RUN = 64


@dataclass(frozen=True)
class SoftmaxPlan:
    """The tile, and how many there are along a run of rows, along a row, and of rows in all."""

    pixels: int
    channels: int
    warps: int
    blocks: int
    steps: int
    channel_tiles: int

    @property
    def whole(self) -> bool:
        """Whether a row fits a tile: then it is read once."""
        return self.channel_tiles == 1


@functools.lru_cache(maxsize=4096)
def plan(walk: Walk, itemsize: int, tiles: int = 1) -> SoftmaxPlan:
    """Return the plan of a kernel that keeps so many ``tiles``, of tensors of ``itemsize`` bytes an element."""
    most = _MOST // tiles
    channels = power_of_two(walk.channels)
    # Where rows are adjacent, or nothing is, neighbouring rows share sectors.
    together = 1 if walk.channels_run else power_of_two(min(walk.inner, _RUN // itemsize))
    if channels * together <= most:
        pixels = min(max(_SHORT // channels, together), power_of_two(walk.inner))
    else:
        pixels = together
        channels = max(_LONG // power_of_two(tiles) // pixels, 1)
    elements = pixels * channels
    blocks = cdiv(walk.inner, pixels)
    return SoftmaxPlan(
        pixels=pixels,
        channels=channels,
        warps=power_of_two(cdiv(elements, 32 * _EACH), high=32),
        blocks=blocks,
        steps=walk.rows * walk.height * blocks,
        channel_tiles=cdiv(walk.channels, channels),
    )
