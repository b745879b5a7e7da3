"""Functions shared by the kernels of softmax and of cross entropy: a tile of rows, and a row's maximum and sum."""

import triton
import triton.language as tl

from gpukern.ops._batch_norm.functions import channel_tile, load_tile


@triton.jit
def load_logits(
    image, n, h, p, c, inside, valid, PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr
):
    """A tile in fp32, −∞ beyond the end of a row: neutral for the maximum and for the sum of exponentials."""
    x = load_tile(image, n, h, p, c, inside & valid, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
    return tl.where(valid, x, float("-inf"))


@triton.jit
def top_and_total(tile):
    """(max x, Σ exp(x − max x)) of rows in one tile: [BLOCK_P, 1]. A row of −∞ alone gets NaN, as torch's."""
    top = tl.max(tile, axis=1, keep_dims=True)
    return top, tl.sum(tl.exp(tile - top), axis=1, keep_dims=True)


@triton.jit
def top_and_total_of_tiles(
    image, n, h, p, inside, sizes,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """:func:`top_and_total` of longer rows in one pass: the sum so far is rescaled to each new maximum.

    See Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
    """
    top = tl.full((BLOCK_P, 1), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_P, 1), tl.float32)
    for tile in range(sizes.channel_tiles):
        c, valid = channel_tile(tile, sizes, BLOCK_C, CHANNEL_ALIGN)
        x = load_logits(image, n, h, p, c, inside, valid, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
        new = tl.maximum(top, tl.max(x, axis=1, keep_dims=True))
        # Nothing but −∞ so far: its difference from itself would be NaN, and stay.
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift), axis=1, keep_dims=True)
        top = new
    return top, total
