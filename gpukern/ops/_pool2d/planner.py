"""Planner of pooling: division into programs. Imports neither torch nor Triton.

Every kernel works on a tile [channels, pixels] of one tensor: the output in forward, the input in backward. Pooling
moves much memory and computes little, so a tile is chosen for its accesses alone: many pixels of few channels where
pixels are adjacent (NCHW), many channels of few pixels where channels are (channels_last).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gpukern.ops._pool2d.problem import AdaptiveProblem, Pair, PoolProblem
from gpukern.runtime.integers import cdiv, power_of_two

_THREADS = 128
#: Loops are unrolled to have many loads in flight, up to this many elements a thread: more would spill.
_UNROLLED_LOADS = 72
#: CUDA's limit for a grid's second dimension.
_GRID_Y = 65535


class Tile(NamedTuple):
    """The tile of one program. ``pixels`` counts positions in one window in the tile of a whole-window kernel."""

    channels: int
    pixels: int
    warps: int = _THREADS // 32


@dataclass(frozen=True)
class PoolPlan:
    """Tiles and loop bounds.

    ``window`` is the largest window (rows, columns) in taps, ``owners`` the most windows (vertically, horizontally)
    that contain one input pixel. ``divisor`` is an average's divisor where all windows share it, else 0.
    ``whole_window`` is the tile for one program per window, or None where a thread walks through its own window.
    """

    tile: Tile
    whole_window: Tile | None
    window: Pair
    owners: Pair
    divisor: int
    unroll_window: int
    unroll_owners: int


@functools.lru_cache(maxsize=4096)
def plan(problem: PoolProblem | AdaptiveProblem, channels_last: bool, itemsize: int) -> PoolPlan:
    """Return the plan for tensors whose channels are adjacent (``channels_last``) or not, of ``itemsize`` bytes."""
    if isinstance(problem, AdaptiveProblem):
        # The windows that contain an input pixel are the inverse relation of the pixels in a window.
        window = largest_share(problem.H, problem.P), largest_share(problem.W, problem.Q)
        owners = largest_share(problem.P, problem.H), largest_share(problem.Q, problem.W)
        divisor = 0
    else:
        window = problem.kernel
        extents = ((size - 1) * dilation + 1 for size, dilation in zip(problem.kernel, problem.dilation, strict=True))
        over_rows, over_columns = (cdiv(e, stride) for e, stride in zip(extents, problem.stride, strict=True))
        owners = over_rows, over_columns
        divisor = problem.divisor_override or common_divisor(
            (problem.H, problem.W),
            (problem.P, problem.Q),
            problem.kernel,
            problem.stride,
            problem.padding,
            problem.count_include_pad,
        )
    tile = tile_for(problem.C, channels_last, itemsize)
    elements = max(1, tile.channels * tile.pixels // _THREADS)
    # A window of a maximum's backward costs two loads, the gradient and the tap.
    return PoolPlan(
        tile=tile,
        whole_window=_whole_window(problem, window, channels_last, itemsize),
        window=window,
        owners=owners,
        divisor=divisor,
        unroll_window=unroll(window, elements),
        unroll_owners=unroll(owners, 2 * elements),
    )


def tile_for(channels: int, channels_last: bool, itemsize: int) -> Tile:
    """Return the tile of a kernel in which a thread walks through its own window."""
    if not channels_last:
        # A thread has one pixel of four channels, which share the arithmetic of the pixel's position.
        return Tile(_launchable(min(4, power_of_two(channels)), channels), _THREADS)
    block = _launchable(_channel_block(channels, itemsize), channels)
    # A thread moves 16 bytes at a time, or single elements where Triton cannot prove that rows are aligned.
    elements = 16 // itemsize if channels % 16 == 0 else 4
    return Tile(block, max(1, _THREADS * elements // block))


def _whole_window(
    problem: PoolProblem | AdaptiveProblem, window: Pair, channels_last: bool, itemsize: int
) -> Tile | None:
    """The tile for one program per window: where windows are large and hardly overlap, as in global pooling.

    Then there are too few outputs to keep a GPU busy with one thread each.
    """
    area = window[0] * window[1]
    if area < 32 or problem.P * problem.Q * area > 2 * problem.H * problem.W:
        return None
    if channels_last:
        block = _launchable(_channel_block(problem.C, itemsize), problem.C)
        return Tile(block, max(1, 1024 // block))
    places = min(1024, power_of_two(area))
    return Tile(_launchable(min(1024 // places, power_of_two(problem.C)), problem.C), places)


def _channel_block(channels: int, itemsize: int) -> int:
    """At most 64 channels: without a ragged last block if that leaves whole 32-byte sectors, else as many as fit."""
    even = min(64, channels & -channels)
    return even if even * itemsize >= 32 else min(64, power_of_two(channels))


def _launchable(block: int, channels: int) -> int:
    while cdiv(channels, block) > _GRID_Y:
        block *= 2
    return block


def common_divisor(
    sizes: Sequence[int],
    results: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    count_include_pad: bool,
) -> int:
    """Return the number of elements in a window if no window is truncated anywhere, else 0; of any dimensions."""
    for size, outputs, taps, step, pad in zip(sizes, results, kernel, stride, padding, strict=True):
        counted = pad if count_include_pad else 0
        if pad > counted or (outputs - 1) * step - pad + taps > size + counted:
            return 0
    return math.prod(kernel)


def largest_share(size: int, parts: int) -> int:
    """The most elements in one of ``parts`` overlapping shares ⌊i·size/parts⌋ … ⌈(i+1)·size/parts⌉ − 1."""
    return max((cdiv((i + 1) * size, parts) - i * size // parts for i in range(parts)), default=0)


def unroll(steps: Pair, loads: int) -> int:
    """The unrolling factor of a loop over (rows, columns) with ``loads`` elements a step: all, a row, or what fits."""
    rows, columns = steps
    for factor in (rows * columns, columns):
        if factor * loads <= _UNROLLED_LOADS:
            return max(1, factor)
    return max(1, _UNROLLED_LOADS // 2 // loads)
