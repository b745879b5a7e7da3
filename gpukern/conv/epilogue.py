"""Epilogue of the forward kernels' sums before they leave the chip, and split-K sums shared by blocks."""

import triton
import triton.language as tl

from gpukern.ops._reduction.functions import is_last, store_part


@triton.jit
def add_splits(acc, partial_ptr, counter_ptr, tile, split, SPLITS: tl.constexpr):
    """Return (the sum over all splits, whether this program is the tile's last and has it).

    Each program writes its ``acc`` [A, B] to partial[tile, split, A, B]; the last to arrive adds them all in the
    order of the splits, whichever program comes last: the same bits in every run.
    """
    SIZE: tl.constexpr = acc.shape[0] * acc.shape[1]
    place = tl.arange(0, acc.shape[0])[:, None] * acc.shape[1] + tl.arange(0, acc.shape[1])[None, :]
    first = partial_ptr + tile.to(tl.int64) * (SPLITS * SIZE) + place
    tl.store(first + split * SIZE, acc)
    last = is_last(counter_ptr + tile, SPLITS)
    total = acc
    if last:
        total = tl.load(first)
        for other in range(1, SPLITS):
            total += tl.load(first + other * SIZE)
    return total, last


@triton.jit
def pooled_columns(y, COLS: tl.constexpr):
    """Return the maximum of each 2 × 2 pixels, a NaN if there is one; ``y`` is [channels, rows of COLS pixels].

    Reductions, not halves and their maximum: with Triton 3.6 the tensor cores would wait for the halves of a split sum.
    """
    CHANNELS: tl.constexpr = y.shape[0]
    PIXELS: tl.constexpr = y.shape[1]
    y = tl.reduce(y.reshape(CHANNELS, PIXELS // 2, 2), 2, _larger)
    y = tl.reduce(y.reshape(CHANNELS, PIXELS // 2 // COLS, 2, COLS // 2), 2, _larger)
    return y.reshape(CHANNELS, PIXELS // 4)


@triton.jit
def pooled_rows(y):
    """Return the maximum of each four neighbouring rows, a NaN if there is one; ``y`` is [pixels, channels]."""
    return tl.reduce(y.reshape(y.shape[0] // 4, 4, y.shape[1]), 1, _larger)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def store_statistics(y, valid, statistics, tile, tiles, channel, channels, AXIS: tl.constexpr):
    """Write each channel's sum of ``y`` over its valid pixels, of squared deviations from their mean, and their count.

    ``y`` [pixels, channels], or transposed, fp32 but rounded as stored; AXIS is that of the pixels and ``valid`` is
    broadcast to y. Once all parts of a tile are stored, the program calls ``merge_statistics``.
    """
    y = tl.where(valid, y, 0.0)
    # Count one column, since all are the same: a whole tile of ones would take as many registers as y.
    count = tl.sum(valid.to(tl.float32), axis=AXIS)
    total = tl.sum(y, axis=AXIS)
    mean = total / tl.maximum(count, 1.0)
    deviation = tl.where(valid, y - tl.expand_dims(mean, AXIS), 0.0)
    squares = tl.sum(deviation * deviation, axis=AXIS)
    count = tl.broadcast_to(count, total.shape)
    store_part(statistics.parts, (total, squares, count), tile, tiles, channel, channel < channels, channels)
