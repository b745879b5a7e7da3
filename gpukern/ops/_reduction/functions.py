"""Functions of kernels whose programs leave partial results, and whose last program to arrive merges them.

Parts are merged in two steps, so that no program reads more than a few dozen of them while all others are done: the
last program of each *group* of tiles merges its group's, the last of these programs those of all groups. Either takes
them in the order of the tiles, whichever program it is: the same bits in every run.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Statistics(NamedTuple):
    """Where a kernel leaves the statistics of each channel of its output; pointers, None where nothing is wanted.

    The tiles of a column have the same channels, those of a row the same pixels.
    """

    parts: Any = None  # fp32 [3, tiles, channels]: each tile's sums, squared deviations from its mean, counts; groups'
    counters: Any = None  # int32 [columns of tiles, groups + 1], zeros before and after the launch
    group: Any = None  # rows of tiles in a group
    mean: Any = None  # fp32 [channels]
    variance: Any = None  # fp32 [channels], biased
    running_mean: Any = None  # [channels]
    running_variance: Any = None
    momentum: Any = 0.0
    sums: Any = None  # fp32 [channels], and
    deviations: Any = None  # Σ(y − mean)², instead of mean and variance


class Sums(NamedTuple):
    """Where a kernel leaves sums over the pixels of each channel; pointers, None where nothing is wanted."""

    parts: Any = None  # fp32 [sums, tiles, channels], and groups'
    counters: Any = None  # as above
    group: Any = None
    totals: Any = None  # fp32 [sums, channels]
    grad_bias: Any = None  # [channels] of any dtype: the first sum, Σ g
    grad_weight: Any = None  # the second one, Σ g·x̂
    count: Any = None  # fp32 [1]: the values of a channel, where the totals are of more than one tensor


@triton.jit
def is_last(counter_ptr, programs):
    """Whether this program is the last of so many to arrive at a counter; it sets the counter to zero again.

    It can then load what the others stored before they arrived.
    """
    # All threads' stores come before the count that announces them ...
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        # ... and all others' before the loads that follow.
        tl.debug_barrier()
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def store_part(parts, values, tile, tiles, channel, valid, channels):
    """Write what a tile, or a group, contributes to each channel: ``values``[i] to ``parts``[i, tile]."""
    place = parts + (tile.to(tl.int64) * channels + channel)
    plane = tl.cast(tiles, tl.int64) * channels
    for i in tl.static_range(len(values)):
        tl.store(place + i * plane, values[i], mask=valid)


@triton.jit
def _merged_statistics(parts, first, end, tiles, channel, valid, channels, row):
    """(Σ y, Σ(y − mean)², count) of the tiles from ``first`` to ``end``, fp32 [1, channels]; ``row`` is [rows, 1].

    By Chan, Golub and LeVeque's formula, without a difference of large numbers: see "Algorithms for computing the
    sample variance", 1983. As many tiles as there are rows are in flight.
    """
    plane = tl.cast(tiles, tl.int64) * channels
    total = 0.0 * channel.to(tl.float32)
    deviations = total
    count = total
    for start in range(first, end, row.shape[0]):
        inside = (start + row < end) & valid
        place = parts + ((start + row).to(tl.int64) * channels + channel)
        sums = tl.load(place, mask=inside, other=0.0)  # [rows, channels]
        squares = tl.load(place + plane, mask=inside, other=0.0)
        counts = tl.load(place + 2 * plane, mask=inside, other=0.0)
        new_total = tl.sum(sums, axis=0, keep_dims=True)
        new_count = tl.sum(counts, axis=0, keep_dims=True)
        new_mean = new_total / tl.maximum(new_count, 1.0)
        apart = sums / tl.maximum(counts, 1.0) - new_mean
        deviations += tl.sum(squares + counts * apart * apart, axis=0, keep_dims=True)
        apart = tl.where(count > 0.0, new_mean - total / tl.maximum(count, 1.0), 0.0)
        deviations += apart * apart * (count * new_count / tl.maximum(count + new_count, 1.0))
        total += new_total
        count += new_count
    return total, deviations, count


@triton.jit
def _added(parts, first, end, tiles, channel, valid, channels, row, SUMS: tl.constexpr):
    """Return each of so many sums over the tiles from ``first`` to ``end``."""
    plane = tl.cast(tiles, tl.int64) * channels
    totals = ()
    for _ in tl.static_range(SUMS):
        totals += (0.0 * channel.to(tl.float32),)  # type: ignore[assignment]
    for start in range(first, end, row.shape[0]):
        inside = (start + row < end) & valid
        place = parts + ((start + row).to(tl.int64) * channels + channel)
        more = ()
        for i in tl.static_range(SUMS):
            part = tl.load(place + i * plane, mask=inside, other=0.0)  # [rows, channels]
            more += (totals[i] + tl.sum(part, axis=0, keep_dims=True),)  # type: ignore[assignment]
        totals = more
    return totals


@triton.jit
def _merged(parts, first, end, tiles, channel, valid, channels, row, SUMS: tl.constexpr):
    if SUMS is None:
        return _merged_statistics(parts, first, end, tiles, channel, valid, channels, row)
    else:
        return _added(parts, first, end, tiles, channel, valid, channels, row, SUMS)


@triton.jit
def finish_statistics(statistics, mean, deviations, count, channel, valid):
    """Store mean and variance, and update the running ones as torch does: with the unbiased variance.

    Returns the variance.
    """
    variance = deviations / count
    tl.store(statistics.mean + channel, mean, mask=valid)
    tl.store(statistics.variance + channel, variance, mask=valid)
    if statistics.running_mean is not None:
        # A batch of one value, 0 / 0, never gets here; channels beyond the last do.
        unbiased = deviations / tl.maximum(count - 1.0, 1.0)
        _update(statistics.running_mean, mean, statistics.momentum, channel, valid)
        _update(statistics.running_variance, unbiased, statistics.momentum, channel, valid)
    return variance


@triton.jit
def _update(running_ptr, new, momentum, channel, valid):
    old = tl.load(running_ptr + channel, mask=valid, other=0.0).to(tl.float32)
    value = (1.0 - momentum) * old + momentum * new
    tl.store(running_ptr + channel, value.to(running_ptr.dtype.element_ty), mask=valid)


@triton.jit
def finish_sums(sums, values, channel, valid, channels):
    """Store the sums over all tiles."""
    if sums.totals is not None:
        for i in tl.static_range(len(values)):
            tl.store(sums.totals + i * channels + channel, values[i], mask=valid)
    if sums.grad_bias is not None:
        tl.store(sums.grad_bias + channel, values[0].to(sums.grad_bias.dtype.element_ty), mask=valid)
    if sums.grad_weight is not None:
        tl.store(sums.grad_weight + channel, values[1].to(sums.grad_weight.dtype.element_ty), mask=valid)


@triton.jit
def _finish(out, values, channel, valid, channels, SUMS: tl.constexpr):
    if SUMS is not None:
        finish_sums(out, values, channel, valid, channels)
    else:
        total, deviations, count = values
        if out.sums is not None:
            tl.store(out.sums + channel, total, mask=valid)
            tl.store(out.deviations + channel, deviations, mask=valid)
        else:
            count = tl.maximum(count, 1.0)  # of channels beyond the last
            finish_statistics(out, total / count, deviations, count, channel, valid)


# Not inlined: registers that the last programs need would otherwise decide how many all programs get.
@triton.jit(noinline=True)
def merge_statistics(
    statistics,  # Statistics
    row, rows, column,  # of this program's tile, and how many rows there are
    first, end,  # channels of the column
    channels,  # in all
    BLOCK: tl.constexpr,  # channels of a tile
    PARTS: tl.constexpr = 1,  # of each tile
):  # fmt: skip
    """Arrive with what :func:`store_part` stored of this tile: (Σ y, Σ(y − mean)², count).

    The last program to arrive finishes the statistics.
    """
    LANES: tl.constexpr = min(BLOCK, 32)
    part = tl.arange(0, max(32, 256 // LANES))[:, None]
    lane = tl.arange(0, LANES)[None, :]
    merge_in_groups(statistics, row, rows, column, first, end, channels, part, lane, BLOCK, PARTS, None)
    # The caller may overwrite shared memory that a call uses, without a barrier between them.
    tl.debug_barrier()


@triton.jit(noinline=True)
def merge_sums(
    sums,  # Sums
    row, rows, column, first, end, channels,
    SUMS: tl.constexpr,  # how many there are of each channel
    BLOCK: tl.constexpr, PARTS: tl.constexpr = 1,
):  # fmt: skip
    """Arrive with the sums that :func:`store_part` stored of this tile, as at :func:`merge_statistics`."""
    LANES: tl.constexpr = min(BLOCK, 32)
    # With fewer rows of two channels, ptxas spills a register on sm_80; with more of four, on sm_80 or sm_90.
    ROWS: tl.constexpr = 32 if LANES >= 4 else 256 * LANES
    part = tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    merge_in_groups(sums, row, rows, column, first, end, channels, part, lane, BLOCK, PARTS, SUMS)
    tl.debug_barrier()


@triton.jit
def merge_in_groups(
    out, row, rows, column, first, end, channels,
    part,  # [parts, 1], from 0: those that are read at a time
    lane,  # [1, channels], from 0
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
    SUMS: tl.constexpr,  # None for statistics
):  # fmt: skip
    """:func:`merge_statistics` or :func:`merge_sums`, with ranges of the caller's layouts."""
    LANES: tl.constexpr = lane.shape[1]
    NUMBERS: tl.constexpr = 3 if SUMS is None else SUMS
    groups = tl.cdiv(rows, out.group)
    group = row // out.group
    begin = group * out.group
    members = tl.minimum(rows - begin, out.group)
    counters = out.counters + column * (groups + 1)
    if is_last(counters + group, members):
        parts = out.parts
        tiles = rows * PARTS
        begin *= PARTS
        members *= PARTS
        last = groups == 1
        if groups > 1:
            of_groups = parts + NUMBERS * (tiles.to(tl.int64) * channels)
            for start in range(0, BLOCK, LANES):
                channel = first + start + lane
                valid = channel < end
                values = _merged(parts, begin, begin + members, tiles, channel, valid, channels, part, SUMS)
                store_part(of_groups, values, group, groups, channel, valid, channels)
            last = is_last(counters + groups, groups)
            parts = of_groups
            tiles = groups
            begin = 0 * groups
            members = groups
        if last:
            for start in range(0, BLOCK, LANES):
                channel = first + start + lane
                valid = channel < end
                values = _merged(parts, begin, begin + members, tiles, channel, valid, channels, part, SUMS)
                _finish(out, values, channel, valid, channels, SUMS)
