"""Planner of group norm: division into programs. Imports neither torch nor Triton.

A program takes whole groups of one image where their pixels fit its registers: every tensor is then read once. Larger
groups are summed as a batch norm's channels are, split among programs, and read a second time.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from gpukern.ops._batch_norm.planner import tile, tiles_under_way
from gpukern.ops._batch_norm.problem import Walk
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.integers import cdiv, power_of_two

#: Elements that a program of a launch with one input keeps, in fp32, while it sums: half of a multiprocessor's
#: registers. With more inputs, or where addresses take as many registers as values, fewer.
_KEPT = 32 * 1024
#: Values of a thread, of two inputs at least, and the fewest elements of a program, which has several small groups.
_PER_THREAD, _LEAST = 64, 2048
_WARPS = 16
#: Neighbouring channels that are read together, in bytes: two sectors if possible, and half a one at least. With less,
#: the second level of the cache would deliver each sector so often that two passes over whole sectors are faster.
_RUN, _SHORTEST_RUN = 64, 16
#: A sum's programs per multiprocessor, the fewest tiles of a split, and the maximum number of its parts.
_PROGRAMS_PER_SM, _LEAST_STEPS, _SPLITS = 4, 8, 512


@dataclass(frozen=True)
class Resident:
    """Tiles of ``channels`` columns, ``columns`` to a group, and all ``pixels`` of an image.

    ``splits``: of the images, for a launch that sums over these.
    """

    pixels: int
    channels: int
    columns: int
    warps: int
    tiles: int
    splits: int
    images_per_split: int


@dataclass(frozen=True)
class Split:
    """Tiles of channels, whatever their groups, and how an image's ``steps``, a tile of pixels each, are shared."""

    pixels: int
    channels: int
    warps: int
    unroll: int
    blocks: int  # tiles along a run of pixels
    tiles: int
    steps: int
    splits: int
    steps_per_split: int


@functools.lru_cache(maxsize=4096)
def resident(
    walk: Walk, group: int, itemsize: int, device: DeviceSpec, inputs: int, far: bool = False
) -> Resident | None:
    """Return the plan of a kernel that reads so many ``inputs``; None if a group does not fit.

    ``far``: offsets have 64 bits, and take twice the registers.
    """
    columns = power_of_two(group)
    pixels = power_of_two(walk.inner)
    aligned = max(aligned_group(walk, group), walk.pixel_align) * itemsize >= 16
    crowded = (1 if aligned else 2) * (2 if far else 1)
    limit = _KEPT // (power_of_two(inputs) * crowded)
    if walk.height > 1 or pixels * columns > limit:
        return None
    # Beside another input, several groups may take half of the registers: ptxas would spill a few of them.
    room = limit if inputs == 1 else limit // 2
    most = min(power_of_two(walk.channels // group), max(1, room // (pixels * columns)))
    wanted = cdiv(_LEAST, pixels * columns)
    if walk.channels_run:
        wanted = max(wanted, cdiv(_RUN, columns * itemsize))
    channels = columns * min(power_of_two(wanted), most)
    if walk.channels_run and pixels > 1 and channels < walk.channels and channels * itemsize < _SHORTEST_RUN:
        return None
    tiles = cdiv(walk.channels // group, channels // columns)
    images_per_split = cdiv(walk.rows, min(walk.rows, cdiv(_PROGRAMS_PER_SM * device.sm_count, tiles), _SPLITS))
    return Resident(
        pixels=pixels,
        channels=channels,
        columns=columns,
        warps=power_of_two(cdiv(pixels * channels * max(inputs, 2) * crowded, 32 * _PER_THREAD), high=_WARPS),
        tiles=tiles,
        splits=cdiv(walk.rows, images_per_split),
        images_per_split=images_per_split,
    )


@functools.lru_cache(maxsize=4096)
def split(walk: Walk, itemsize: int, device: DeviceSpec, sums: bool, far: bool = False) -> Split:
    """Return the plan of a kernel that ``sums`` over the pixels of each channel of each image, or does not."""
    pixels, channels, warps, aligned = tile(walk, itemsize, sums)
    blocks = cdiv(walk.inner, pixels)
    tiles = cdiv(walk.channels, channels)
    steps = walk.height * blocks
    splits = 1
    if sums:
        wanted = cdiv(_PROGRAMS_PER_SM * device.sm_count, tiles * walk.rows)
        splits = max(1, min(wanted, steps // _LEAST_STEPS, _SPLITS))
    steps_per_split = cdiv(steps, splits)
    return Split(
        pixels=pixels,
        channels=channels,
        warps=warps,
        unroll=tiles_under_way(aligned, far),
        blocks=blocks,
        tiles=tiles,
        steps=steps,
        splits=cdiv(steps, steps_per_split),
        steps_per_split=steps_per_split,
    )


def aligned_group(walk: Walk, group: int) -> int:
    """Return the channels that a tile of whole groups reads at once."""
    return math.gcd(walk.channel_align, group) if group & (group - 1) else walk.channel_align
