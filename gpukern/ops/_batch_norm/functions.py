"""Functions shared by the batch norm kernels: sizes and addresses of a tile."""

from typing import NamedTuple

import triton
import triton.language as tl


class Sizes(NamedTuple):
    """Sizes of the walk of a launch, see :class:`gpukern.ops._batch_norm.problem.Walk`."""

    channel_groups: object  # channels / CHANNEL_ALIGN
    inner_groups: object  # pixels of a run / PIXEL_ALIGN
    height: object  # runs of a row
    blocks: object  # tiles of a run
    channel_tiles: object
    pixels: object  # in all


@triton.jit
def channel_tile(tile, sizes, BLOCK_C: tl.constexpr, CHANNEL_ALIGN: tl.constexpr):
    """Return (channels of the tile, which of them exist)."""
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    # A product shows the compiler what divides the bound: otherwise it would check every element separately.
    return c, c < sizes.channel_groups * CHANNEL_ALIGN


@triton.jit
def pixel_tile(step, sizes, BLOCK_P: tl.constexpr, PIXEL_ALIGN: tl.constexpr, INDEX: tl.constexpr):
    """Return (row, run of the row, pixels of the run, which of them exist)."""
    run = step // sizes.blocks
    p = (step % sizes.blocks).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    return (run // sizes.height).to(INDEX), (run % sizes.height).to(INDEX), p, p < sizes.inner_groups * PIXEL_ALIGN


@triton.jit
def at(image, n, h, p, c, PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr):
    run = n * image.n + h * image.h
    across = c.to(INDEX) * image.c
    if CHANNEL_ALIGN > 1:
        return image.ptr + (tl.multiple_of(run + p * image.w, (CHANNEL_ALIGN, CHANNEL_ALIGN)) + across)
    else:
        return image.ptr + (tl.multiple_of(run + across, (PIXEL_ALIGN, PIXEL_ALIGN)) + p * image.w)


@triton.jit
def load_tile(image, n, h, p, c, mask, PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr):
    place = at(image, n, h, p, c, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(
    image, value, n, h, p, c, mask, PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr
):
    """Store a tile and return it as stored, rounded."""
    rounded = value.to(image.ptr.dtype.element_ty)
    tl.store(at(image, n, h, p, c, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX), rounded, mask=mask)
    return rounded.to(tl.float32)
