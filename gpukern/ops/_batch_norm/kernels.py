"""Batch norm kernels. Images are :class:`gpukern.ops._images.Image`: a pointer and the strides of [N, C, H, W].

Tiles are [BLOCK_P, BLOCK_C], values per pixel [BLOCK_P, 1] and per channel [1, BLOCK_C]. A *step* is one
tile of pixels; programs that sum take several, of one tile of channels. All arithmetic is fp32, every sum has a fixed
order, and there are no atomics: the same bits in every run. See :mod:`gpukern.ops.batch_norm` for the mathematics.
"""

import triton
import triton.language as tl

from gpukern.ops._activation.functions import activation_backward, apply_activation
from gpukern.ops._batch_norm.functions import channel_tile, load_tile, pixel_tile, store_tile
from gpukern.ops._normalization import affine, load_numbers
from gpukern.ops._reduction.functions import (
    finish_statistics,
    finish_sums,
    merge_statistics,
    merge_sums,
    store_part,
)

# ---- forward -------------------------------------------------------------------------------------------------------


@triton.jit
def _normalize(
    x, residual, y, n, h, p, c, mask, mean, scale, bias, negative_slope,
    ACTIVATION: tl.constexpr, PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    # The difference first: with a large mean, x·scale and mean·scale would cancel.
    z = (load_tile(x, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX) - mean) * scale + bias
    if residual.ptr is not None:
        z += load_tile(residual, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
    value = apply_activation(z, ACTIVATION, negative_slope)
    store_tile(y, value, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)


@triton.jit
def batch_norm_kernel(
    x,  # Image
    residual,  # Image, or nothing (its ptr None)
    y,  # Image
    norm, sizes, eps, negative_slope,
    ACTIVATION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """y = act((x − mean) · weight / √(variance + eps) + bias + residual). Grid: steps · channel tiles."""
    c, valid = channel_tile(tl.program_id(0) % sizes.channel_tiles, sizes, BLOCK_C, CHANNEL_ALIGN)
    n, h, p, inside = pixel_tile(tl.program_id(0) // sizes.channel_tiles, sizes, BLOCK_P, PIXEL_ALIGN, INDEX)
    mean = load_numbers(norm.mean, c, valid, 0.0)
    _, scale, bias = affine(norm, load_numbers(norm.variance, c, valid, 1.0), c, valid, eps)
    _normalize(
        x, residual, y, n, h, p, c, inside & valid, mean, scale, bias, negative_slope,
        ACTIVATION, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX,
    )  # fmt: skip


@triton.jit
def batch_norm_statistics_kernel(
    x,  # Image
    residual,  # Image, or nothing; of one split only, as y
    y,  # Image
    norm,
    statistics,  # Statistics; a split is a row of tiles
    sizes, steps, steps_per_split, splits, eps, negative_slope,
    WHOLE: tl.constexpr, UNROLL: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Mean and variance of each channel in the batch, or if WHOLE, all of batch norm. Grid: splits · channel tiles.

    Every element of a tile sums differences from its first value, the pivot, and their squares. As the pivot is one of
    the values, the sum of squares is never much larger than the deviation computed from it, whatever the mean is. The
    elements are then merged by Chan, Golub and LeVeque's formula, as the splits are.
    """
    c, valid = channel_tile(tl.program_id(0) % sizes.channel_tiles, sizes, BLOCK_C, CHANNEL_ALIGN)
    split = tl.program_id(0) // sizes.channel_tiles
    first = split * steps_per_split
    last = tl.minimum(first + steps_per_split, steps)
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
    mean += origin
    if not WHOLE:
        channels = sizes.channel_groups * CHANNEL_ALIGN
        pixels = tl.broadcast_to(pixels, mean.shape)
        store_part(statistics.parts, (mean * pixels, deviations, pixels), split, splits, c, valid, channels)
        tile = tl.program_id(0) % sizes.channel_tiles
        merge_statistics(statistics, split, splits, tile, tile * BLOCK_C, channels, channels, BLOCK_C)
    else:
        variance = finish_statistics(statistics, mean, deviations, pixels, c, valid)
        _, scale, bias = affine(norm, variance, c, valid, eps)
        for step in tl.range(first, last, loop_unroll_factor=UNROLL):
            n, h, p, inside = pixel_tile(step, sizes, BLOCK_P, PIXEL_ALIGN, INDEX)
            _normalize(
                x, residual, y, n, h, p, c, inside & valid, mean, scale, bias, negative_slope,
                ACTIVATION, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX,
            )  # fmt: skip


# ---- backward ------------------------------------------------------------------------------------------------------


@triton.jit
def _gradient(
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


@triton.jit
def batch_norm_backward_kernel(
    grad,  # Image: ∂L/∂y
    x,  # Image, or nothing where nothing depends on it
    other,  # Image: the residual where the activation's derivative needs its input, else y; or nothing
    inner,  # Image: ∂L/∂z is written there; or nothing
    out,  # Image: ∂L/∂x is written there; or nothing
    norm,
    sums,  # Sums of ∂L/∂z and ∂L/∂z · x̂, or None; a split is a row of tiles
    sizes, steps, steps_per_split, splits, eps, negative_slope,
    TRAINING: tl.constexpr, WHOLE: tl.constexpr, UNROLL: tl.constexpr,
    ACTIVATION: tl.constexpr, NEEDS_INPUT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """One pass over all tensors: the sums, and ∂L/∂x if it does not depend on them (frozen statistics).

    WHOLE: a second pass writes ∂L/∂x if it does. Grid: splits · channel tiles.
    """
    c, valid = channel_tile(tl.program_id(0) % sizes.channel_tiles, sizes, BLOCK_C, CHANNEL_ALIGN)
    split = tl.program_id(0) // sizes.channel_tiles
    first = split * steps_per_split
    last = tl.minimum(first + steps_per_split, steps)
    mean = load_numbers(norm.mean, c, valid, 0.0)
    inverse, scale, bias = affine(norm, load_numbers(norm.variance, c, valid, 1.0), c, valid, eps)
    sum_g = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_gx = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for step in tl.range(first, last, loop_unroll_factor=UNROLL):
        n, h, p, inside = pixel_tile(step, sizes, BLOCK_P, PIXEL_ALIGN, INDEX)
        mask = inside & valid
        g, normal = _gradient(
            grad, x, other, n, h, p, c, mask, mean, inverse, scale, bias, negative_slope,
            ACTIVATION, NEEDS_INPUT, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX,
        )  # fmt: skip
        if inner.ptr is not None:
            # The sums are of the stored values, which a second launch reads.
            g = store_tile(inner, g, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
        if not TRAINING and out.ptr is not None:
            store_tile(out, g * scale, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
        sum_g += g
        sum_gx += g * normal

    total_g = tl.sum(sum_g, 0)[None, :]
    total_gx = tl.sum(sum_gx, 0)[None, :]
    if sums is not None:
        channels = sizes.channel_groups * CHANNEL_ALIGN
        if WHOLE:
            finish_sums(sums, (total_g, total_gx), c, valid, channels)
        else:
            store_part(sums.parts, (total_g, total_gx), split, splits, c, valid, channels)
            tile = tl.program_id(0) % sizes.channel_tiles
            merge_sums(sums, split, splits, tile, tile * BLOCK_C, channels, channels, 2, BLOCK_C)
    if WHOLE and TRAINING and out.ptr is not None:
        count = tl.cast(sizes.pixels, tl.float32)
        for step in tl.range(first, last, loop_unroll_factor=UNROLL):
            n, h, p, inside = pixel_tile(step, sizes, BLOCK_P, PIXEL_ALIGN, INDEX)
            mask = inside & valid
            g, normal = _gradient(
                grad, x, other, n, h, p, c, mask, mean, inverse, scale, bias, negative_slope,
                ACTIVATION, NEEDS_INPUT, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX,
            )  # fmt: skip
            value = (g - total_g / count - normal * (total_gx / count)) * scale
            store_tile(out, value, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)


@triton.jit
def batch_norm_input_grad_kernel(
    grad,  # Image: ∂L/∂y, or ∂L/∂z with ACTIVATION "none"
    x,  # Image
    other,  # Image, as above
    out,  # Image
    norm,
    sums,  # Sums: the totals Σ ∂L/∂z and Σ ∂L/∂z · x̂, and where these go in the parameters' dtypes, if anywhere
    sizes, eps, negative_slope,
    ACTIVATION: tl.constexpr, NEEDS_INPUT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """∂L/∂x = weight / σ · (∂L/∂z − its mean − x̂ · the mean of ∂L/∂z · x̂). Grid: steps · channel tiles."""
    c, valid = channel_tile(tl.program_id(0) % sizes.channel_tiles, sizes, BLOCK_C, CHANNEL_ALIGN)
    n, h, p, inside = pixel_tile(tl.program_id(0) // sizes.channel_tiles, sizes, BLOCK_P, PIXEL_ALIGN, INDEX)
    mask = inside & valid
    mean = load_numbers(norm.mean, c, valid, 0.0)
    inverse, scale, bias = affine(norm, load_numbers(norm.variance, c, valid, 1.0), c, valid, eps)
    count = tl.cast(sizes.pixels, tl.float32)
    if sums.count is not None:
        count = tl.load(sums.count)
    total_g = load_numbers(sums.totals, c, valid, 0.0)
    total_gx = load_numbers(sums.totals + sizes.channel_groups * CHANNEL_ALIGN, c, valid, 0.0)
    if tl.program_id(0) < sizes.channel_tiles:
        if sums.grad_bias is not None:
            tl.store(sums.grad_bias + c, total_g.to(sums.grad_bias.dtype.element_ty), mask=valid)
        if sums.grad_weight is not None:
            tl.store(sums.grad_weight + c, total_gx.to(sums.grad_weight.dtype.element_ty), mask=valid)
    mean_g = total_g / count
    mean_gx = total_gx / count
    g, normal = _gradient(
        grad, x, other, n, h, p, c, mask, mean, inverse, scale, bias, negative_slope,
        ACTIVATION, NEEDS_INPUT, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX,
    )  # fmt: skip
    value = (g - mean_g - normal * mean_gx) * scale
    store_tile(out, value, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
