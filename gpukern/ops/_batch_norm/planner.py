"""Planner of batch norm: division into programs. Imports neither torch nor Triton.

Tiles are [pixels, channels]. All kernels move much memory and compute little, so a tile is chosen for its accesses
alone: many channels where these are adjacent (channels_last, and (N, C)), many pixels where those are (NCHW). Sums over
pixels are split among programs, so that few channels keep a whole GPU busy.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from gpukern.ops._batch_norm.problem import Walk
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.integers import cdiv, power_of_two

_WARPS = 4
#: Accesses of 16 bytes that a thread makes to each tensor. Kernels that sum keep several numbers per element, and have
#: the loads of more tiles in flight instead (of fewer where every element has its own address).
_ACCESSES, _SUMMING_ACCESSES = 2, 1
_TILES_UNDER_WAY, _UNALIGNED_UNDER_WAY = 4, 2
#: A sum over so few tiles is not worth splitting, nor two more launches; and the fewest tiles of a split.
_FEW_STEPS, _LEAST_STEPS = 16, 8
#: A sum's programs per multiprocessor, and the maximum number of its parts, all of which one program reads.
_PROGRAMS_PER_SM = 4
_SPLITS = 512


@dataclass(frozen=True)
class BatchNormPlan:
    """The tile, and how steps, one tile of pixels each, are shared by the programs of a sum.

    With one split a program has all pixels of its channels, and a single launch does everything.
    """

    pixels: int
    channels: int
    warps: int
    unroll: int  # tiles whose loads a summing program has in flight
    blocks: int  # tiles along a run of pixels
    steps: int
    splits: int
    steps_per_split: int
    channel_tiles: int


@functools.lru_cache(maxsize=4096)
def plan(walk: Walk, itemsize: int, device: DeviceSpec, sums: bool, far: bool = False) -> BatchNormPlan:
    """Return the plan of a kernel that ``sums`` over pixels, or does not, for tensors of ``itemsize`` bytes an element.

    ``far``: offsets have 64 bits, and take twice the registers.
    """
    pixels, channels, warps, aligned = tile(walk, itemsize, sums)
    blocks = cdiv(walk.inner, pixels)
    steps = walk.rows * walk.height * blocks
    channel_tiles = cdiv(walk.channels, channels)
    splits = 1
    if sums and steps > _FEW_STEPS:
        wanted = cdiv(_PROGRAMS_PER_SM * device.sm_count, channel_tiles)
        splits = min(wanted, steps // _LEAST_STEPS, _SPLITS)
    steps_per_split = cdiv(steps, splits)
    return BatchNormPlan(
        pixels=pixels,
        channels=channels,
        warps=warps,
        unroll=tiles_under_way(aligned, far),
        blocks=blocks,
        steps=steps,
        splits=cdiv(steps, steps_per_split),
        steps_per_split=steps_per_split,
        channel_tiles=channel_tiles,
    )


def tile(walk: Walk, itemsize: int, sums: bool) -> tuple[int, int, int, bool]:
    """Return (pixels, channels, warps, whether accesses are aligned) of a tile."""
    sixteen = 16 // itemsize
    aligned = max(walk.channel_align, walk.pixel_align) >= sixteen
    # If runs begin at any address, each element is a separate access.
    elements = 32 * _WARPS * (_SUMMING_ACCESSES if sums else _ACCESSES) * (sixteen if aligned else 4)
    pixels, channels = _channel_tile(walk, itemsize, elements) if walk.channels_run else _pixel_tile(walk, elements)
    return pixels, channels, min(_WARPS, power_of_two(pixels * channels * _WARPS // elements)), aligned


def tiles_under_way(aligned: bool, far: bool) -> int:
    """Return how many tiles' loads a summing program has in flight."""
    return (_TILES_UNDER_WAY if aligned else _UNALIGNED_UNDER_WAY) // (2 if far else 1)


def _channel_tile(walk: Walk, itemsize: int, elements: int) -> tuple[int, int]:
    """At most 64 channels: without a ragged last tile if that leaves whole 32-byte sectors, else as many as fit."""
    even = min(64, walk.channels & -walk.channels)
    channels = even if even * itemsize >= 32 else min(64, power_of_two(walk.channels))
    return min(elements // channels, power_of_two(walk.inner)), channels


def _pixel_tile(walk: Walk, elements: int) -> tuple[int, int]:
    """Runs of whole cache lines, cut so that the last piece of a run is full if possible."""
    longest = min(256, power_of_two(walk.inner))
    lengths = [length for length in (256, 128, 64) if length <= longest] or [longest]
    pixels = min(lengths, key=lambda length: (cdiv(walk.inner, length) * length, -length))
    return pixels, min(elements // pixels, power_of_two(walk.channels))
