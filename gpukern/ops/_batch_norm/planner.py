"""How batch norm is cut into programs: pure Python, no torch, no Triton.

Tiles are [pixels, channels]. All kernels move much memory and compute little, so a tile is chosen for its accesses
alone: many channels where these lie side by side (channels_last, and (N, C)), many pixels where those do (NCHW). What
is summed over pixels is split among programs, so that few channels keep a whole GPU busy.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from gpukern.ops._batch_norm.problem import Walk
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.integers import cdiv, power_of_two

_WARPS = 4
#: Accesses of 16 bytes that a thread makes to each tensor. Kernels that sum keep several numbers for each element, and
#: have the loads of some more tiles under way instead (where single elements have addresses, of fewer).
_ACCESSES, _SUMMING_ACCESSES = 2, 1
_TILES_UNDER_WAY, _UNALIGNED_UNDER_WAY = 4, 2
#: A sum over so few tiles is not worth splitting, nor two launches more; and the least that a split gets.
_FEW_STEPS, _LEAST_STEPS = 16, 8
#: Programs that a multiprocessor gets of a sum, and the most parts of one, all of which one program reads.
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
    unroll: int  # tiles whose loads a program that sums has under way
    blocks: int  # tiles along a run of pixels
    steps: int
    splits: int
    steps_per_split: int
    channel_tiles: int


@functools.lru_cache(maxsize=4096)
def plan(walk: Walk, itemsize: int, device: DeviceSpec, sums: bool, far: bool = False) -> BatchNormPlan:
    """The plan of a kernel that ``sums`` over pixels, or of one that does not, for tensors of ``itemsize`` an element.

    ``far``: offsets have 64 bits, and take twice the registers.
    """
    sixteen = 16 // itemsize
    aligned = max(walk.channel_align, walk.pixel_align) >= sixteen
    # Where runs begin anywhere, each element is an access of its own.
    elements = 32 * _WARPS * (_SUMMING_ACCESSES if sums else _ACCESSES) * (sixteen if aligned else 4)
    pixels, channels = _channel_tile(walk, itemsize, elements) if walk.channels_run else _pixel_tile(walk, elements)
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
        warps=min(_WARPS, power_of_two(pixels * channels * _WARPS // elements)),
        unroll=(_TILES_UNDER_WAY if aligned else _UNALIGNED_UNDER_WAY) // (2 if far else 1),
        blocks=blocks,
        steps=steps,
        splits=cdiv(steps, steps_per_split),
        steps_per_split=steps_per_split,
        channel_tiles=channel_tiles,
    )


def _channel_tile(walk: Walk, itemsize: int, elements: int) -> tuple[int, int]:
    """At most 64 channels: without a ragged last tile if that leaves whole 32-byte sectors, else as many as fit."""
    even = min(64, walk.channels & -walk.channels)
    channels = even if even * itemsize >= 32 else min(64, power_of_two(walk.channels))
    return min(elements // channels, power_of_two(walk.inner)), channels


def _pixel_tile(walk: Walk, elements: int) -> tuple[int, int]:
    """Runs of whole cache lines, cut so that the last piece of a run is full if that can be."""
    longest = min(256, power_of_two(walk.inner))
    lengths = [length for length in (256, 128, 64) if length <= longest] or [longest]
    pixels = min(lengths, key=lambda length: (cdiv(walk.inner, length) * length, -length))
    return pixels, min(elements // pixels, power_of_two(walk.channels))
