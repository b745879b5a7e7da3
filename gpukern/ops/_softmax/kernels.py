"""Softmax kernels. Images are :class:`gpukern.ops._images.Image`, with the numbers of a row as channels.

Tiles are [BLOCK_P, BLOCK_C], values of a row [BLOCK_P, 1]; all arithmetic is fp32. WHOLE: a row is one tile, and read
once. Grid: tiles of rows. See :mod:`gpukern.ops.softmax` for the mathematics.
"""

import triton
import triton.language as tl

from gpukern.ops._batch_norm.functions import channel_tile, load_tile, pixel_tile, store_tile
from gpukern.ops._softmax.functions import load_logits, top_and_total, top_and_total_of_tiles


@triton.jit
def softmax_kernel(
    x, y,  # Images
    sizes,
    LOG: tl.constexpr, WHOLE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """y = exp(x − max x) / Σ exp(x − max x) of each row, or LOG, its logarithm."""
    n, h, p, inside = pixel_tile(tl.program_id(0), sizes, BLOCK_P, PIXEL_ALIGN, INDEX)
    if WHOLE:
        c, valid = channel_tile(0, sizes, BLOCK_C, CHANNEL_ALIGN)
        logits = load_logits(x, n, h, p, c, inside, valid, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
        top, total = top_and_total(logits)
        value = _normalized(logits, top, total, LOG)
        store_tile(y, value, n, h, p, c, inside & valid, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
    else:
        top, total = top_and_total_of_tiles(
            x, n, h, p, inside, sizes, BLOCK_P, BLOCK_C, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX
        )
        for tile in range(sizes.channel_tiles):
            c, valid = channel_tile(tile, sizes, BLOCK_C, CHANNEL_ALIGN)
            logits = load_logits(x, n, h, p, c, inside, valid, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
            value = _normalized(logits, top, total, LOG)
            store_tile(y, value, n, h, p, c, inside & valid, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)


@triton.jit
def _normalized(logits, top, total, LOG: tl.constexpr):
    if LOG:
        return logits - top - tl.log(total)
    else:
        return tl.exp(logits - top) / total


@triton.jit
def softmax_backward_kernel(
    grad, y, out,  # Images
    sizes,
    LOG: tl.constexpr, WHOLE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """∂L/∂x = y · (g − Σ g·y), or LOG, g − exp(y) · Σ g."""
    n, h, p, inside = pixel_tile(tl.program_id(0), sizes, BLOCK_P, PIXEL_ALIGN, INDEX)
    if WHOLE:
        c, valid = channel_tile(0, sizes, BLOCK_C, CHANNEL_ALIGN)
        mask = inside & valid
        g = load_tile(grad, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
        saved = load_tile(y, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
        total = tl.sum(_summed(g, saved, LOG), axis=1, keep_dims=True)
        store_tile(out, _gradient(g, saved, total, LOG), n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
    else:
        total = tl.zeros((BLOCK_P, 1), tl.float32)
        for tile in range(sizes.channel_tiles):
            c, valid = channel_tile(tile, sizes, BLOCK_C, CHANNEL_ALIGN)
            mask = inside & valid
            g = load_tile(grad, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
            saved = g  # the logarithm's sum does not need it
            if not LOG:
                saved = load_tile(y, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
            total += tl.sum(_summed(g, saved, LOG), axis=1, keep_dims=True)
        for tile in range(sizes.channel_tiles):
            c, valid = channel_tile(tile, sizes, BLOCK_C, CHANNEL_ALIGN)
            mask = inside & valid
            g = load_tile(grad, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
            saved = load_tile(y, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
            store_tile(out, _gradient(g, saved, total, LOG), n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)


@triton.jit
def _summed(g, saved, LOG: tl.constexpr):
    return g if LOG else g * saved


@triton.jit
def _gradient(g, saved, total, LOG: tl.constexpr):
    return g - tl.exp(saved) * total if LOG else (g - total) * saved
