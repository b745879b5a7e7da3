"""Batch norm kernels. Images are :class:`gpukern.ops._images.Image`: a pointer and the strides of [N, C, H, W].

Tiles are [BLOCK_P, BLOCK_C], values per pixel [BLOCK_P, 1] and per channel [1, BLOCK_C]. A *step* is one
tile of pixels; programs that sum take several, of one tile of channels. All arithmetic is fp32, every sum has a fixed
order, and there are no atomics: the same bits in every run. See :mod:`gpukern.ops.batch_norm` for the mathematics.
"""

import triton
import triton.language as tl

from gpukern.ops._batch_norm.functions import (
    channel_tile,
    gradient_tile,
    normalize_tile,
    pixel_tile,
    statistics_of,
    store_tile,
)
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
    normalize_tile(
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
    """Mean and variance of each channel in the batch, or if WHOLE, all of batch norm. Grid: splits · channel tiles."""
    c, valid = channel_tile(tl.program_id(0) % sizes.channel_tiles, sizes, BLOCK_C, CHANNEL_ALIGN)
    split = tl.program_id(0) // sizes.channel_tiles
    first = split * steps_per_split
    last = tl.minimum(first + steps_per_split, steps)
    mean, deviations, pixels = statistics_of(
        x, first, last, c, valid, sizes, UNROLL, BLOCK_P, BLOCK_C, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX
    )
    if not WHOLE:
        channels = sizes.channel_groups * CHANNEL_ALIGN
        store_part(statistics.parts, (mean * pixels, deviations, pixels), split, splits, c, valid, channels)
        tile = tl.program_id(0) % sizes.channel_tiles
        merge_statistics(statistics, split, splits, tile, tile * BLOCK_C, channels, channels, BLOCK_C)
    else:
        variance = finish_statistics(statistics, mean, deviations, pixels, c, valid)
        _, scale, bias = affine(norm, variance, c, valid, eps)
        for step in tl.range(first, last, loop_unroll_factor=UNROLL):
            n, h, p, inside = pixel_tile(step, sizes, BLOCK_P, PIXEL_ALIGN, INDEX)
            normalize_tile(
                x, residual, y, n, h, p, c, inside & valid, mean, scale, bias, negative_slope,
                ACTIVATION, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX,
            )  # fmt: skip


# ---- backward ------------------------------------------------------------------------------------------------------


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
        g, normal = gradient_tile(
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
            g, normal = gradient_tile(
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
    g, normal = gradient_tile(
        grad, x, other, n, h, p, c, mask, mean, inverse, scale, bias, negative_slope,
        ACTIVATION, NEEDS_INPUT, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX,
    )  # fmt: skip
    value = (g - mean_g - normal * mean_gx) * scale
    store_tile(out, value, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
