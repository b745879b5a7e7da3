"""Functions shared by the kernels of norms: sizes and addresses of a tile, and what is computed of one."""

from typing import NamedTuple

import triton
import triton.language as tl

from gpukern.ops._activation.functions import activation_backward, apply_activation


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
def _only(values):
    """Return the element of a tensor [1, 1]. Folded to a scalar, it would keep promises for two dimensions, at which
    Triton's analysis fails."""
    return tl.sum(tl.sum(values, 1), 0)


@triton.jit
def at(image, n, h, p, c, PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr):
    run = n * image.n + h * image.h
    across = c.to(INDEX) * image.c
    if CHANNEL_ALIGN > 1:
        if p.shape[0] == 1:
            return image.ptr + (tl.multiple_of(run + _only(p) * image.w, CHANNEL_ALIGN) + across)
        else:
            return image.ptr + (tl.multiple_of(run + p * image.w, (CHANNEL_ALIGN, CHANNEL_ALIGN)) + across)
    elif c.shape[1] == 1:
        return image.ptr + (tl.multiple_of(run + _only(across), PIXEL_ALIGN) + p * image.w)
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


@triton.jit
def statistics_of(
    x, first, last, c, valid, sizes,
    UNROLL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """(mean, Σ(x − mean)², count) of each channel over the steps from ``first`` to ``last``, [1, BLOCK_C].

    Every element of a tile sums differences from its first value, the pivot, and their squares. As the pivot is one of
    the values, the sum of squares is never much larger than the deviation computed from it, whatever the mean is. The
    elements are then merged by Chan, Golub and LeVeque's formula, as the splits are.
    """
    n, h, p, _ = pixel_tile(first, sizes, BLOCK_P, PIXEL_ALIGN, INDEX)
    # Where the first tile has no pixel, a later one may: any pixel of the channel serves as its pivot.
    p = tl.minimum(p, sizes.inner_groups * PIXEL_ALIGN - 1)
    pivot = load_tile(x, n, h, p, c, valid & (p >= 0), 1, CHANNEL_ALIGN, INDEX)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    count = tl.zeros((BLOCK_P, 1), tl.float32)
    for step in tl.range(first, last, loop_unroll_factor=UNROLL):
        n, h, p, inside = pixel_tile(step, sizes, BLOCK_P, PIXEL_ALIGN, INDEX)
        mask = inside & valid
        value = load_tile(x, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
        apart = tl.where(mask, value - pivot, 0.0)
        total += apart
        squares += apart * apart
        count += inside.to(tl.float32)

    pixels = tl.sum(count, 0)[None, :]
    some = tl.maximum(count, 1.0)
    squares = squares - total * total / some
    squares = tl.where(squares < 0.0, 0.0, squares)  # not maximum: a NaN must propagate
    # From here on all means are relative to one value of the channel: differences keep their digits.
    origin = tl.sum(tl.where(tl.arange(0, BLOCK_P)[:, None] == 0, pivot, 0.0), 0)[None, :]
    means = pivot - origin + total / some
    mean = tl.sum(count * means, 0)[None, :] / pixels
    from_mean = means - mean
    deviations = tl.sum(squares + count * from_mean * from_mean, 0)[None, :]
    return mean + origin, deviations, tl.broadcast_to(pixels, mean.shape)


@triton.jit
def normalize_tile(
    x, residual, y, n, h, p, c, mask, mean, scale, bias, negative_slope,
    ACTIVATION: tl.constexpr, PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Store act((x − mean) · scale + bias + residual)."""
    # The difference first: with a large mean, x·scale and mean·scale would cancel.
    z = (load_tile(x, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX) - mean) * scale + bias
    if residual.ptr is not None:
        z += load_tile(residual, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
    value = apply_activation(z, ACTIVATION, negative_slope)
    store_tile(y, value, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)


@triton.jit
def gradient_tile(
    grad, x, other, n, h, p, c, mask, mean, inverse, scale, bias, negative_slope,
    ACTIVATION: tl.constexpr, NEEDS_INPUT: tl.constexpr,
    PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """(∂L/∂z, x̂) where y = act(z), z = x̂ · weight + bias + residual; zero outside."""
    g = load_tile(grad, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
    from_mean = tl.zeros(mask.shape, tl.float32)
    if x.ptr is not None:
        from_mean = load_tile(x, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX) - mean
    if ACTIVATION != "none":
        # From x, which is loaded anyway; y is read only if it includes a residual.
        saved = from_mean * scale + bias
        if other.ptr is not None:
            kept = load_tile(other, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
            saved = saved + kept if NEEDS_INPUT else kept
        elif not NEEDS_INPUT:
            saved = apply_activation(saved, ACTIVATION, negative_slope)
        g = activation_backward(g, saved, ACTIVATION, negative_slope)
    return tl.where(mask, g, 0.0), tl.where(mask, from_mean * inverse, 0.0)
