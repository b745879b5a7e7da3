"""Planner of 3-D pooling: tiles as in 2-D, of voxels. Imports neither torch nor Triton."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from gpukern.ops._pool2d.planner import Tile, common_divisor, largest_share, tile_for, unroll
from gpukern.ops._pool3d.problem import AdaptivePool, Triple, VolumePool
from gpukern.runtime.integers import cdiv


@dataclass(frozen=True)
class VolumePoolPlan:
    """Tile and loop bounds, as :class:`gpukern.ops._pool2d.planner.PoolPlan`."""

    tile: Tile
    window: Triple
    owners: Triple
    divisor: int
    unroll_window: int
    unroll_owners: int


@functools.lru_cache(maxsize=4096)
def plan(problem: VolumePool | AdaptivePool, channels_last: bool, itemsize: int) -> VolumePoolPlan:
    """Return the plan for tensors whose channels are adjacent (``channels_last``) or not, of ``itemsize`` bytes."""
    window, owners = windows(problem)
    divisor = 0
    if isinstance(problem, VolumePool):
        counted = problem.kernel, problem.stride, problem.padding, problem.count_include_pad
        divisor = problem.divisor_override or common_divisor(problem.image, problem.result, *counted)
    tile = tile_for(problem.C, channels_last, itemsize)
    elements = max(1, tile.channels * tile.pixels // (32 * tile.warps))
    # A window of a maximum's backward costs two loads, the gradient and the tap, and the numbers of three dimensions.
    return VolumePoolPlan(
        tile=tile,
        window=window,
        owners=owners,
        divisor=divisor,
        unroll_window=unroll((window[0] * window[1], window[2]), elements),
        unroll_owners=unroll((owners[0] * owners[1], owners[2]), 3 * elements),
    )


def windows(problem: VolumePool | AdaptivePool) -> tuple[Triple, Triple]:
    """Return the largest window in taps, and the most windows along each dimension that contain one voxel."""
    if isinstance(problem, VolumePool):
        extents = [(size - 1) * dilation + 1 for size, dilation in zip(problem.kernel, problem.dilation, strict=True)]
        over_planes, over_rows, over_columns = map(cdiv, extents, problem.stride)
        return problem.kernel, (over_planes, over_rows, over_columns)
    # The windows that contain a voxel are the inverse relation of the voxels in a window.
    T, R, S = map(largest_share, problem.image, problem.result)
    over_planes, over_rows, over_columns = map(largest_share, problem.result, problem.image)
    return (T, R, S), (over_planes, over_rows, over_columns)
