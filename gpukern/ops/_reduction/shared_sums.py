"""Sums that programs of a launch share: each leaves its part in memory, and the last to arrive adds all parts.

A tile of SIZE sums has ``splits`` parts. The last program adds them all or, where it would take too long to read so
many, the last of every ``fan_in`` splits adds those, and the last of all the sums of these groups. Without groups
``fan_in`` is None; ``splits.py`` chooses it. The order is fixed, whichever program comes last: the same bits in every
run. Parts are written by ordinary stores, because a barrier does not order those of the TMA.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gpukern.ops._reduction.functions import is_last


class SharedSums(NamedTuple):
    """Where the programs of a launch leave the parts of their sums, and count themselves."""

    parts: Any  # fp32 [tiles, splits + groups, SIZE]: of every split, then the sums of every group
    counters: Any  # int32 [tiles, groups + 1]: of every group, then of them all; zeros before the launch and after it


@triton.jit
def leave_part(acc, shared, tile, split, splits, fan_in, offset, SIZE: tl.constexpr):
    """Write ``acc`` [A, B], which are the sums from ``offset`` on of the tile's SIZE, to this split's part."""
    place = tl.arange(0, acc.shape[0])[:, None] * acc.shape[1] + tl.arange(0, acc.shape[1])[None, :]
    tl.store(_part(shared, tile, split, splits, fan_in, SIZE) + (offset + place), acc)


@triton.jit
def last_to_arrive(shared, tile, split, splits, fan_in, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """Return whether this program, which has left its part, is the tile's last: then it is to write the total."""
    if fan_in is None:
        last = is_last(shared.counters + tile, splits)
    else:
        groups = tl.cdiv(splits, fan_in)
        group = split // fan_in
        members = min(fan_in, splits - group * fan_in)
        counters = shared.counters + tile * (groups + 1)
        last = is_last(counters + group, members)
        if last:
            first = _part(shared, tile, group * fan_in, splits, fan_in, SIZE)
            added = _part(shared, tile, splits + group, splits, fan_in, SIZE)
            for start in range(0, SIZE, CHUNK):
                i = start + tl.arange(0, CHUNK)
                tl.store(added + i, _added(first, members, i, SIZE), mask=i < SIZE)
            last = is_last(counters + groups, groups)
    return last


@triton.jit
def total_of(shared, tile, splits, fan_in, i, SIZE: tl.constexpr):
    """Return the sums ``i`` [CHUNK] of the tile over all splits; called by its last program alone."""
    if fan_in is None:
        total = _added(_part(shared, tile, 0, splits, fan_in, SIZE), splits, i, SIZE)
    else:
        total = _added(_part(shared, tile, splits, splits, fan_in, SIZE), tl.cdiv(splits, fan_in), i, SIZE)
    return total


@triton.jit
def _part(shared, tile, part, splits, fan_in, SIZE: tl.constexpr):
    parts = splits
    if fan_in is not None:
        parts += tl.cdiv(splits, fan_in)
    return shared.parts + (tl.cast(tile, tl.int64) * parts + part) * SIZE


@triton.jit
def _added(first_ptr, count, i, SIZE: tl.constexpr):
    """Return Σ_part first[part, i] over ``count`` parts, in their order.

    Six steps are fetched ahead, through shared memory: a program that waits for one part after the other would take
    longer than the product did, and for so many loads into registers the compiler allows too few of them.
    """
    AT_ONCE: tl.constexpr = max(1, 512 // i.shape[0])
    part = tl.arange(0, AT_ONCE)[:, None]
    total = tl.zeros(i.shape, tl.float32)
    for start in tl.range(0, count, AT_ONCE, num_stages=7):
        inside = (start + part < count) & (i < SIZE)[None, :]
        values = tl.load(first_ptr + ((start + part) * SIZE + i[None, :]), mask=inside, other=0.0)
        total += tl.sum(values, axis=0)
    return total
