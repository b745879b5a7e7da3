"""Kernels of two batch norms that are added. Images and tiles are those of the batch norm kernels.

See :mod:`gpukern.ops.norm_pair` for the mathematics.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gpukern.ops._activation.functions import activation_backward, apply_activation
from gpukern.ops._batch_norm.functions import channel_tile, load_tile, pixel_tile, store_tile
from gpukern.ops._normalization import affine, load_numbers
from gpukern.ops._reduction.functions import finish_sums, merge_sums, store_part


@triton.jit
def _numbers(norm, c, valid, eps):
    """(mean, 1 / standard deviation, weight / standard deviation, bias)."""
    inverse, scale, bias = affine(norm, load_numbers(norm.variance, c, valid, 1.0), c, valid, eps)
    return load_numbers(norm.mean, c, valid, 0.0), inverse, scale, bias


@triton.jit
def norm_pair_kernel(
    a, b, y,  # Images
    norm_a, norm_b, sizes, eps_a, eps_b, negative_slope,
    ACTIVATION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """y = act(norm of a + norm of b). Grid: steps · channel tiles."""
    c, valid = channel_tile(tl.program_id(0) % sizes.channel_tiles, sizes, BLOCK_C, CHANNEL_ALIGN)
    n, h, p, inside = pixel_tile(tl.program_id(0) // sizes.channel_tiles, sizes, BLOCK_P, PIXEL_ALIGN, INDEX)
    mask = inside & valid
    mean_a, _, scale_a, bias_a = _numbers(norm_a, c, valid, eps_a)
    mean_b, _, scale_b, bias_b = _numbers(norm_b, c, valid, eps_b)
    # The differences first: with a large mean, z·scale and mean·scale would cancel.
    u = (load_tile(a, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX) - mean_a) * scale_a + bias_a
    u += (load_tile(b, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX) - mean_b) * scale_b + bias_b
    value = apply_activation(u, ACTIVATION, negative_slope)
    store_tile(y, value, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)


@triton.jit
def _gradient(
    grad, y, a, b, n, h, p, c, mask, numbers_a, numbers_b, negative_slope,
    ACTIVATION: tl.constexpr, NEEDS_INPUT: tl.constexpr,
    PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """(g, x̂ of a, x̂ of b), zero outside."""
    mean_a, inverse_a, scale_a, bias_a = numbers_a
    mean_b, inverse_b, scale_b, bias_b = numbers_b
    g = load_tile(grad, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
    from_a = load_tile(a, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX) - mean_a
    from_b = load_tile(b, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX) - mean_b
    if ACTIVATION != "none":
        if y.ptr is not None:
            saved = load_tile(y, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
        else:
            # As the forward does: the same bits.
            saved = from_a * scale_a + bias_a
            saved += from_b * scale_b + bias_b
            if not NEEDS_INPUT:
                saved = apply_activation(saved, ACTIVATION, negative_slope)
        g = activation_backward(g, saved, ACTIVATION, negative_slope)
    g = tl.where(mask, g, 0.0)
    return g, tl.where(mask, from_a * inverse_a, 0.0), tl.where(mask, from_b * inverse_b, 0.0)


@triton.jit
def norm_pair_sums_kernel(
    grad,  # Image: ∂L/∂y
    y,  # Image, or nothing: recomputed
    a, b,  # Images
    norm_a, norm_b,
    sums,  # Sums of g, g · x̂ of a, and g · x̂ of b; a split is a row of tiles
    sizes, steps, steps_per_split, splits, eps_a, eps_b, negative_slope,
    WHOLE: tl.constexpr,  # one split
    ACTIVATION: tl.constexpr, NEEDS_INPUT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The three sums of each channel. Grid: splits · channel tiles."""
    tile = tl.program_id(0) % sizes.channel_tiles
    c, valid = channel_tile(tile, sizes, BLOCK_C, CHANNEL_ALIGN)
    split = tl.program_id(0) // sizes.channel_tiles
    first = split * steps_per_split
    last = tl.minimum(first + steps_per_split, steps)
    numbers_a = _numbers(norm_a, c, valid, eps_a)
    numbers_b = _numbers(norm_b, c, valid, eps_b)
    sum_g = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_a = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_b = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for step in range(first, last):
        n, h, p, inside = pixel_tile(step, sizes, BLOCK_P, PIXEL_ALIGN, INDEX)
        g, normal_a, normal_b = _gradient(
            grad, y, a, b, n, h, p, c, inside & valid, numbers_a, numbers_b, negative_slope,
            ACTIVATION, NEEDS_INPUT, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX,
        )  # fmt: skip
        sum_g += g
        sum_a += g * normal_a
        sum_b += g * normal_b
    totals = (tl.sum(sum_g, 0)[None, :], tl.sum(sum_a, 0)[None, :], tl.sum(sum_b, 0)[None, :])
    channels = sizes.channel_groups * CHANNEL_ALIGN
    if WHOLE:
        finish_sums(sums, totals, c, valid, channels)
    else:
        store_part(sums.parts, totals, split, splits, c, valid, channels)
        merge_sums(sums, split, splits, tile, tile * BLOCK_C, channels, channels, 3, BLOCK_C)


class Parameters(NamedTuple):
    """Where the gradients of weights and biases go, [C] of any dtype; None where nothing is wanted."""

    weight_a: Any
    bias_a: Any
    weight_b: Any
    bias_b: Any


@triton.jit
def _store(ptr, value, c, valid):
    if ptr is not None:
        tl.store(ptr + c, value.to(ptr.dtype.element_ty), mask=valid)


@triton.jit
def norm_pair_input_grad_kernel(
    grad,  # Image: ∂L/∂y, or g with ACTIVATION "none"
    y,  # Image, or nothing
    a, b,  # Images
    out_a, out_b,  # Images
    norm_a, norm_b,
    totals_ptr,  # fp32 [2, C]: Σ g and Σ g·x̂ of a
    of_b_ptr,  # fp32 [C]: Σ g·x̂ of b
    parameters,  # Parameters
    sizes, eps_a, eps_b, negative_slope,
    ACTIVATION: tl.constexpr, NEEDS_INPUT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """∂L/∂a and ∂L/∂b, each weight / σ · (g − its mean − x̂ · the mean of g · x̂), and the parameters' gradients.

    Grid: steps · channel tiles.
    """
    c, valid = channel_tile(tl.program_id(0) % sizes.channel_tiles, sizes, BLOCK_C, CHANNEL_ALIGN)
    n, h, p, inside = pixel_tile(tl.program_id(0) // sizes.channel_tiles, sizes, BLOCK_P, PIXEL_ALIGN, INDEX)
    mask = inside & valid
    numbers_a = _numbers(norm_a, c, valid, eps_a)
    numbers_b = _numbers(norm_b, c, valid, eps_b)
    count = tl.cast(sizes.pixels, tl.float32)
    channels = sizes.channel_groups * CHANNEL_ALIGN
    total_g = load_numbers(totals_ptr, c, valid, 0.0)
    total_a = load_numbers(totals_ptr + channels, c, valid, 0.0)
    total_b = load_numbers(of_b_ptr, c, valid, 0.0)
    if tl.program_id(0) < sizes.channel_tiles:
        _store(parameters.weight_a, total_a, c, valid)
        _store(parameters.bias_a, total_g, c, valid)
        _store(parameters.weight_b, total_b, c, valid)
        _store(parameters.bias_b, total_g, c, valid)
    mean_g = total_g / count
    mean_a = total_a / count
    mean_b = total_b / count
    g, normal_a, normal_b = _gradient(
        grad, y, a, b, n, h, p, c, mask, numbers_a, numbers_b, negative_slope,
        ACTIVATION, NEEDS_INPUT, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX,
    )  # fmt: skip
    g -= mean_g
    store_tile(out_a, (g - normal_a * mean_a) * numbers_a[2], n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
    store_tile(out_b, (g - normal_b * mean_b) * numbers_b[2], n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
