"""Kernels of a 1×1 convolution between two batch norms; see :mod:`gpukern.ops.pointwise_norm` for the mathematics.

All images are rows of channels, [pixels, channels], in a half; sums are fp32 and in a fixed order.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gpukern.ops._activation.functions import activation_backward, apply_activation, needs_input
from gpukern.ops._normalization import affine, load_numbers
from gpukern.ops._reduction.functions import finish_statistics, merge_sums, store_part
from gpukern.ops._reduction.shared_sums import last_to_arrive, leave_part, total_of


class Operand(NamedTuple):
    """What the convolution multiplies: ``d = act(norm(z)) − act(bias)``, rounded to the dtype of z."""

    z: Any  # [pixels, channels]
    norm: Any  # Norm
    eps: Any
    negative_slope: Any
    pixels: Any
    channels: Any


@triton.jit
def _numbers(operand, c, valid, ACTIVATION: tl.constexpr):
    """(mean, 1/σ, weight/σ, bias, act(bias)) of the channels ``c``."""
    inverse, scale, bias = affine(
        operand.norm, load_numbers(operand.norm.variance, c, valid, 1.0), c, valid, operand.eps
    )
    mean = load_numbers(operand.norm.mean, c, valid, 0.0)
    return mean, inverse, scale, bias, apply_activation(bias, ACTIVATION, operand.negative_slope)


@triton.jit
def _rows(operand, pixel, c, valid, INDEX: tl.constexpr):
    """(pointers to z, which of them exist) of [pixels, channels]."""
    place = operand.z + pixel.to(INDEX)[:, None] * operand.channels + c[None, :]
    return place, (pixel < operand.pixels)[:, None] & valid[None, :]


@triton.jit
def _deviation(operand, place, inside, numbers, ACTIVATION: tl.constexpr):
    """d of a tile, zero outside."""
    mean, _, scale, bias, pivot = numbers
    z = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    y = apply_activation((z - mean[None, :]) * scale[None, :] + bias[None, :], ACTIVATION, operand.negative_slope)
    return tl.where(inside, y - pivot[None, :], 0.0).to(operand.z.dtype.element_ty)


@triton.jit(do_not_specialize=["fan_in"])
def pointwise_gram_kernel(
    operand,  # Operand
    gram_ptr,  # fp32 [channels, channels]
    total_ptr,  # fp32 [channels]
    shared,  # SharedSums of BLOCK_C · BLOCK_C + BLOCK_C a tile
    pixels_per_split,
    fan_in,
    ACTIVATION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCKS: tl.constexpr,  # of channels: one or two
    CHUNK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Σ d dᵀ and Σ d over all pixels. Grid: (tiles of the upper triangle, splits)."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    first_row = tile // 2 * BLOCK_C
    first_column = (tile + 1) // 2 * BLOCK_C
    channel = tl.arange(0, BLOCK_C)
    row = first_row + channel
    column = first_column + channel
    row_ok = row < operand.channels
    column_ok = column < operand.channels
    of_rows = _numbers(operand, row, row_ok, ACTIVATION)
    of_columns = _numbers(operand, column, column_ok, ACTIVATION)
    first = split * pixels_per_split
    last = tl.minimum(first + pixels_per_split, operand.pixels)
    gram = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(first, last, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        own = (pixel < last)[:, None]
        place, inside = _rows(operand, pixel, column, column_ok, INDEX)
        b = _deviation(operand, place, inside & own, of_columns, ACTIVATION)
        a = b
        if BLOCKS > 1:
            place, inside = _rows(operand, pixel, row, row_ok, INDEX)
            a = _deviation(operand, place, inside & own, of_rows, ACTIVATION)
        gram = tl.dot(tl.trans(a), b, gram)
        total += tl.sum(b.to(tl.float32), 0)
    SIZE: tl.constexpr = BLOCK_C * BLOCK_C + BLOCK_C
    splits = tl.num_programs(1)
    leave_part(gram, shared, tile, split, splits, fan_in, 0, SIZE)
    leave_part(total[None, :], shared, tile, split, splits, fan_in, BLOCK_C * BLOCK_C, SIZE)
    if last_to_arrive(shared, tile, split, splits, fan_in, SIZE, CHUNK):
        # Tiles on the diagonal have the sums, others a mirror image.
        summed = tl.where(first_row == first_column, operand.channels, 0)
        mirrored_rows = tl.where(first_row == first_column, 0, operand.channels)
        for start in range(0, SIZE, CHUNK):
            i = start + tl.arange(0, CHUNK)
            value = total_of(shared, tile, splits, fan_in, i, SIZE)
            r = first_row + i // BLOCK_C
            c = first_column + i % BLOCK_C
            product = (i < BLOCK_C * BLOCK_C) & (r < operand.channels) & (c < operand.channels)
            tl.store(gram_ptr + r * operand.channels + c, value, mask=product)
            tl.store(gram_ptr + c * operand.channels + r, value, mask=product & (r < mirrored_rows))
            tl.store(total_ptr + c, value, mask=(i >= BLOCK_C * BLOCK_C) & (i < SIZE) & (c < summed))


@triton.jit
def pointwise_statistics_kernel(
    operand,  # Operand, of which the kernel reads the numbers
    gram_ptr, total_ptr,  # of pointwise_gram_kernel
    weight_ptr,  # [outputs, channels]
    projected_ptr,  # fp32 [outputs, channels]: W · Cov d
    center_ptr,  # fp32 [outputs]: W · mean of d
    statistics,  # Statistics: mean and variance, and the running ones
    outputs,
    ACTIVATION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Mean and variance of z = W · act(norm). Grid: blocks of outputs."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.arange(0, BLOCK_C)
    k_ok = k < outputs
    c_ok = c < operand.channels
    count = tl.cast(operand.pixels, tl.float32)
    mean = load_numbers(total_ptr, c, c_ok, 0.0) / count
    projected = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for start in range(0, operand.channels, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        row_ok = row < operand.channels
        mask = row_ok[:, None] & c_ok[None, :]
        covariance = tl.load(gram_ptr + row[:, None] * operand.channels + c[None, :], mask=mask, other=0.0) / count
        covariance -= (load_numbers(total_ptr, row, row_ok, 0.0) / count)[:, None] * mean[None, :]
        w = tl.load(
            weight_ptr + k[:, None] * operand.channels + row[None, :], mask=k_ok[:, None] & row_ok[None, :], other=0.0
        )
        # Three products of TF32 keep fp32's digits.
        projected = tl.dot(w.to(tl.float32), covariance, projected, input_precision="tf32x3")
    place = k[:, None] * operand.channels + c[None, :]
    mask = k_ok[:, None] & c_ok[None, :]
    tl.store(projected_ptr + place, projected, mask=mask)
    w = tl.load(weight_ptr + place, mask=mask, other=0.0).to(tl.float32)
    pivot = _numbers(operand, c, c_ok, ACTIVATION)[4]
    center = tl.sum(w * mean[None, :], 1)
    shift = tl.sum(tl.where(mask, w * pivot[None, :], 0.0), 1)
    tl.store(center_ptr + k, center, mask=k_ok)
    variance = tl.sum(projected * w, 1)
    variance = tl.where(variance < 0.0, 0.0, variance)  # not maximum: a NaN must propagate
    finish_statistics(statistics, center + shift, variance * count, count, k, k_ok)


@triton.jit
def pointwise_forward_kernel(
    operand,  # Operand
    weight_ptr,  # [outputs, channels]
    center_ptr,  # fp32 [outputs]
    norm,  # Norm of the convolution's output
    added_ptr,  # [pixels, outputs] or None: the residual, or with
    added_norm,  # Norm or None: what a batch norm takes to it
    out_ptr,  # [pixels, outputs]
    outputs, eps, added_eps, negative_slope,
    INNER: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """out = act(norm(W · act(norm(z))) + added). Grid: tiles of pixels · tiles of outputs, the latter neighbours."""
    tiles = tl.cdiv(outputs, BLOCK_N)
    pixel = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    k_ok = k < outputs
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, operand.channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        c_ok = c < operand.channels
        place, inside = _rows(operand, pixel, c, c_ok, INDEX)
        d = _deviation(operand, place, inside, _numbers(operand, c, c_ok, INNER), INNER)
        mask = k_ok[:, None] & c_ok[None, :]
        w = tl.load(weight_ptr + k[:, None] * operand.channels + c[None, :], mask=mask, other=0.0)
        acc = tl.dot(d, tl.trans(w), acc)
    _, scale, bias = affine(norm, load_numbers(norm.variance, k, k_ok, 1.0), k, k_ok, eps)
    u = (acc - load_numbers(center_ptr, k, k_ok, 0.0)[None, :]) * scale[None, :] + bias[None, :]
    place = pixel.to(INDEX)[:, None] * outputs + k[None, :]
    mask = (pixel < operand.pixels)[:, None] & k_ok[None, :]
    if added_ptr is not None:
        added = tl.load(added_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if added_norm is not None:
            _, scale, bias = affine(added_norm, load_numbers(added_norm.variance, k, k_ok, 1.0), k, k_ok, added_eps)
            mean = load_numbers(added_norm.mean, k, k_ok, 0.0)
            added = (added - mean[None, :]) * scale[None, :] + bias[None, :]
        u += added
    y = apply_activation(u, ACTIVATION, negative_slope)
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["fan_in"])
def pointwise_products_kernel(
    grad_ptr,  # [pixels, outputs]: g
    operand,  # Operand
    product_ptr,  # fp32 [outputs, channels]: Σ g dᵀ
    total_ptr,  # fp32 [outputs]: Σ g
    outputs,
    shared,  # SharedSums of BLOCK_K · BLOCK_C + BLOCK_K a tile
    pixels_per_split, fan_in,
    ACTIVATION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Σ g dᵀ and Σ g over all pixels. Grid: (tiles, splits), tiles of the same outputs being neighbours."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    column_tiles = tl.cdiv(operand.channels, BLOCK_C)
    first_k = tile // column_tiles * BLOCK_K
    first_c = tile % column_tiles * BLOCK_C
    k = first_k + tl.arange(0, BLOCK_K)
    c = first_c + tl.arange(0, BLOCK_C)
    k_ok = k < outputs
    c_ok = c < operand.channels
    numbers = _numbers(operand, c, c_ok, ACTIVATION)
    first = split * pixels_per_split
    last = tl.minimum(first + pixels_per_split, operand.pixels)
    product = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(first, last, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        own = (pixel < last)[:, None]
        place, inside = _rows(operand, pixel, c, c_ok, INDEX)
        d = _deviation(operand, place, inside & own, numbers, ACTIVATION)
        g = tl.load(grad_ptr + pixel.to(INDEX)[:, None] * outputs + k[None, :], mask=own & k_ok[None, :], other=0.0)
        product = tl.dot(tl.trans(g), d, product)
        total += tl.sum(g.to(tl.float32), 0)
    SIZE: tl.constexpr = BLOCK_K * BLOCK_C + BLOCK_K
    splits = tl.num_programs(1)
    leave_part(product, shared, tile, split, splits, fan_in, 0, SIZE)
    leave_part(total[None, :], shared, tile, split, splits, fan_in, BLOCK_K * BLOCK_C, SIZE)
    if last_to_arrive(shared, tile, split, splits, fan_in, SIZE, CHUNK):
        summed = tl.where(first_c == 0, outputs, 0)
        for start in range(0, SIZE, CHUNK):
            i = start + tl.arange(0, CHUNK)
            value = total_of(shared, tile, splits, fan_in, i, SIZE)
            row = first_k + i // BLOCK_C
            column = first_c + i % BLOCK_C
            inside = (i < BLOCK_K * BLOCK_C) & (row < outputs) & (column < operand.channels)
            tl.store(product_ptr + row * operand.channels + column, value, mask=inside)
            of_sum = first_k + i - BLOCK_K * BLOCK_C
            inside = (i >= BLOCK_K * BLOCK_C) & (i < SIZE) & (of_sum < summed)
            tl.store(total_ptr + of_sum, value, mask=inside)


@triton.jit
def pointwise_gradients_kernel(
    product_ptr, grad_total_ptr,  # of pointwise_products_kernel
    total_ptr,  # of pointwise_gram_kernel
    weight_ptr, projected_ptr,  # [outputs, channels]
    norm,  # Norm of the convolution's output
    center_ptr,  # fp32 [outputs]
    coefficients_ptr,  # fp32 [3, outputs]: A, B and D of ∂L/∂v = A g − B (W d) + D
    grad_weight_ptr,  # [outputs, channels] or None
    grad_scale_ptr, grad_shift_ptr,  # [outputs] or None: Σ g·x̂ and Σ g
    pixels, outputs, channels, eps,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradients of all parameters, and what the input gradient needs. Grid: blocks of outputs."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.arange(0, BLOCK_C)
    k_ok = k < outputs
    c_ok = c < channels
    place = k[:, None] * channels + c[None, :]
    mask = k_ok[:, None] & c_ok[None, :]
    total_g = load_numbers(grad_total_ptr, k, k_ok, 0.0)
    mean = load_numbers(total_ptr, c, c_ok, 0.0) / tl.cast(pixels, tl.float32)
    centered = tl.load(product_ptr + place, mask=mask, other=0.0) - total_g[:, None] * mean[None, :]
    w = tl.load(weight_ptr + place, mask=mask, other=0.0).to(tl.float32)
    inverse, scale, _ = affine(norm, load_numbers(norm.variance, k, k_ok, 1.0), k, k_ok, eps)
    total_gx = tl.sum(w * centered, 1) * inverse
    slope = scale * inverse * (total_gx / tl.cast(pixels, tl.float32))
    shift = slope * load_numbers(center_ptr, k, k_ok, 0.0) - scale * (total_g / tl.cast(pixels, tl.float32))
    tl.store(coefficients_ptr + k, scale, mask=k_ok)
    tl.store(coefficients_ptr + outputs + k, slope, mask=k_ok)
    tl.store(coefficients_ptr + 2 * outputs + k, shift, mask=k_ok)
    if grad_shift_ptr is not None:
        tl.store(grad_shift_ptr + k, total_g.to(grad_shift_ptr.dtype.element_ty), mask=k_ok)
    if grad_scale_ptr is not None:
        tl.store(grad_scale_ptr + k, total_gx.to(grad_scale_ptr.dtype.element_ty), mask=k_ok)
    if grad_weight_ptr is not None:
        projected = tl.load(projected_ptr + place, mask=mask, other=0.0)
        value = scale[:, None] * (centered - (total_gx * inverse)[:, None] * projected)
        tl.store(grad_weight_ptr + place, value.to(grad_weight_ptr.dtype.element_ty), mask=mask)


@triton.jit
def pointwise_input_grad_kernel(
    grad_ptr,  # [pixels, outputs]: g
    operand,  # Operand
    weight_ptr,  # [outputs, channels]
    coefficients_ptr,  # of pointwise_gradients_kernel
    out_ptr,  # [pixels, channels]: ∂L/∂(norm of z)
    sums,  # Sums of it, and of it times x̂ of z; a tile is a row
    outputs,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """The gradient through the outer norm, the convolution and the inner activation. Grid: tiles of pixels.

    The convolution's output is computed once more, a block of outputs at a time, from d, which stays on the chip. Tiles
    are [channels, pixels]: so Hopper's tensor cores have no operand in registers.
    """
    row = tl.program_id(0)
    pixel = row * BLOCK_M + tl.arange(0, BLOCK_M)
    pixel_ok = pixel < operand.pixels
    c = tl.arange(0, BLOCK_C)
    c_ok = c < operand.channels
    place, inside = _rows(operand, pixel, c, c_ok, INDEX)
    d = tl.trans(_deviation(operand, place, inside, _numbers(operand, c, c_ok, ACTIVATION), ACTIVATION))
    acc = tl.zeros((BLOCK_C, BLOCK_M), tl.float32)
    for start in range(0, outputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_ok = k < outputs
        mask = k_ok[:, None] & c_ok[None, :]
        w = tl.load(weight_ptr + k[:, None] * operand.channels + c[None, :], mask=mask, other=0.0)
        mask = k_ok[:, None] & pixel_ok[None, :]
        g = tl.load(grad_ptr + pixel.to(INDEX)[None, :] * outputs + k[:, None], mask=mask, other=0.0).to(tl.float32)
        scale = load_numbers(coefficients_ptr, k, k_ok, 0.0)
        slope = load_numbers(coefficients_ptr + outputs, k, k_ok, 0.0)
        shift = load_numbers(coefficients_ptr + 2 * outputs, k, k_ok, 0.0)
        of_v = g * scale[:, None] + shift[:, None] - tl.dot(w, d) * slope[:, None]
        acc = tl.dot(tl.trans(w), of_v.to(d.dtype), acc)
    # The numbers and z once more, from the cache: in registers they would be kept through the loop.
    mean, inverse, scale, bias, _ = _numbers(operand, c, c_ok, ACTIVATION)
    place = operand.z + pixel.to(INDEX)[None, :] * operand.channels + c[:, None]
    mask = c_ok[:, None] & pixel_ok[None, :]
    from_mean = tl.load(place, mask=mask, other=0.0).to(tl.float32) - mean[:, None]
    if ACTIVATION != "none":
        saved = from_mean * scale[:, None] + bias[:, None]
        if not needs_input(ACTIVATION):
            saved = apply_activation(saved, ACTIVATION, operand.negative_slope)
        acc = activation_backward(acc, saved, ACTIVATION, operand.negative_slope)
    g = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + pixel.to(INDEX)[None, :] * operand.channels + c[:, None], g, mask=mask)
    stored = tl.where(pixel_ok[None, :], g.to(tl.float32), 0.0)
    rows = tl.num_programs(0)
    values = tl.sum(stored, 1), tl.sum(stored * from_mean, 1) * inverse
    store_part(sums.parts, values, row, rows, c, c_ok, operand.channels)
    merge_sums(sums, row, rows, row * 0, 0, operand.channels, operand.channels, 2, BLOCK_C)
