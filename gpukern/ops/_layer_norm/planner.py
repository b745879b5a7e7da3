"""Planner of layer and RMS norm: division into programs. Imports neither torch nor Triton.

All kernels move much memory and compute little. A program takes tiles of whole rows while a row fits its registers:
then every tensor is read once. Longer rows are cut into chunks, which several programs share.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from gpukern.ops._layer_norm.problem import Walk
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.integers import cdiv, power_of_two

#: Columns of the longest row that fits: 32 of them a thread of 16 warps forward, half of that with an epilogue. Each
#: element has five numbers backward, x̂, two gradients and two sums: of 8 warps, which may have twice as many registers.
LONGEST_ROW, LONGEST_ROW_BACKWARD = 16384, 8192
_MOST_WARPS, _MOST_WARPS_BACKWARD = 16, 8
#: Rows of a tile where rows are adjacent in memory: a cache line of 16-bit numbers.
_ADJACENT_ROWS = 64
#: Warps of a multiprocessor that have their loads in flight, and the tiles that each fetches ahead of its own through
#: shared memory, in bytes at most: of 3.3 TB/s and 132 multiprocessors each has 15 KB under way in 600 ns.
_WARPS_PER_SM = 16
_BYTES_AHEAD = 64 * 1024
#: Programs that sum over rows leave their sums in memory: one for each of so many rows, if not for each multiprocessor.
_ROWS_PER_PART = 40
#: A chunk of a long row, and its warps; tiles of the passes over long rows.
_CHUNK, _CHUNK_WARPS = 4096, 8
_TILE = (4, 512)
#: Programs that share long rows, per multiprocessor, and the maximum number of parts.
_PROGRAMS_PER_SM, _SPLITS = 4, 256


def fits(columns: int, backward: bool, epilogue: bool) -> bool:
    """Whether a program's registers hold a row, forward or backward, with a residual or an activation or without."""
    return columns <= (LONGEST_ROW_BACKWARD if backward else LONGEST_ROW // 2 if epilogue else LONGEST_ROW)


@dataclass(frozen=True)
class RowPlan:
    """A tile of whole rows, and how steps, a tile each, are shared by programs."""

    rows: int
    columns: int
    warps: int
    stages: int
    blocks: int  # tiles along a run of rows
    steps: int
    programs: int
    steps_per_program: int


@functools.lru_cache(maxsize=4096)
def row_plan(walk: Walk, itemsizes: tuple[int, ...], device: DeviceSpec, backward: bool) -> RowPlan:
    """Return the plan for a row that fits. ``itemsizes``: bytes of an element of each tensor that is read."""
    columns = power_of_two(walk.columns)
    # 32 bytes a thread of the tensor with the smallest elements, on 4 warps or 8; rows that are adjacent fill lines.
    elements = 2 * 32 * (8 if backward else 4) * (16 // min(itemsizes))
    across, most = any(walk.rows_run), LONGEST_ROW_BACKWARD if backward else LONGEST_ROW
    if across:  # whose transposition takes registers, of numbers of 4 bytes twice as many
        most = min(most, 2 * LONGEST_ROW // max(itemsizes))
    rows = max(elements // columns, _ADJACENT_ROWS if across else 1)
    rows = min(rows, power_of_two(walk.inner), max(1, most // columns))
    warps = min(_MOST_WARPS_BACKWARD if backward else _MOST_WARPS, power_of_two(cdiv(rows * columns, 32 * 16)))
    blocks = cdiv(walk.inner, rows)
    steps = walk.outer * walk.height * blocks
    ahead = _BYTES_AHEAD // (rows * columns * sum(itemsizes))
    per_sm = max(1, _WARPS_PER_SM // warps)
    if backward:
        # A thread with 32 elements takes all registers that it can have; and parts of sums are traffic.
        many = rows * columns > 16 * 32 * warps or walk.rows < 2 * _ROWS_PER_PART * device.sm_count
        per_sm = 1 if many else min(2, per_sm)
    steps_per_program = cdiv(steps, per_sm * device.sm_count)
    return RowPlan(
        rows=rows,
        columns=columns,
        warps=warps,
        stages=1 + min(2, ahead, steps_per_program - 1),
        blocks=blocks,
        steps=steps,
        programs=cdiv(steps, steps_per_program),
        steps_per_program=steps_per_program,
    )


@dataclass(frozen=True)
class ChunkPlan:
    """Chunks of a long row, and how they are shared by programs."""

    columns: int
    warps: int
    splits: int
    chunks_per_split: int


@functools.lru_cache(maxsize=4096)
def chunk_plan(walk: Walk, device: DeviceSpec) -> ChunkPlan:
    """Return the plan of sums over long rows."""
    chunks = cdiv(walk.columns, _CHUNK)
    splits = min(chunks, _SPLITS, cdiv(_PROGRAMS_PER_SM * device.sm_count, walk.rows))
    chunks_per_split = cdiv(chunks, splits)
    return ChunkPlan(_CHUNK, _CHUNK_WARPS, cdiv(chunks, chunks_per_split), chunks_per_split)


@dataclass(frozen=True)
class TilePlan:
    """Tiles of a pass over long rows. A program has some of its column tile, one after the other."""

    rows: int
    columns: int
    warps: int
    blocks: int
    steps: int
    column_tiles: int
    splits: int
    steps_per_split: int


@functools.lru_cache(maxsize=4096)
def tile_plan(walk: Walk, device: DeviceSpec, sums: bool) -> TilePlan:
    """Return the plan of a pass that ``sums`` over rows, or of one whose programs have a tile each."""
    rows, columns = _TILE
    rows = min(rows, power_of_two(walk.inner))
    blocks = cdiv(walk.inner, rows)
    steps = walk.outer * walk.height * blocks
    column_tiles = cdiv(walk.columns, columns)
    splits = min(steps, _SPLITS, cdiv(_PROGRAMS_PER_SM * device.sm_count, column_tiles)) if sums else steps
    steps_per_split = cdiv(steps, splits)
    return TilePlan(
        rows=rows,
        columns=columns,
        warps=4,
        blocks=blocks,
        steps=steps,
        column_tiles=column_tiles,
        splits=cdiv(steps, steps_per_split),
        steps_per_split=steps_per_split,
    )
