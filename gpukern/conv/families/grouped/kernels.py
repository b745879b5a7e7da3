"""Grouped convolution with few channels a group, on tensor cores: forward and input gradient.

Neighbouring groups are joined to one matrix product whose filter is block diagonal: zeros between the groups. Of tiles
of 32 × 32 channels with 4 in a group an eighth is useful, which still costs less than multiplying element by element.
The zeros are never in memory: they are what a masked load leaves. Times an infinity or a NaN of another group they are
NaN, so a tile that has any NaN is computed once more, one group after the other.
"""

import triton
import triton.language as tl

from gpukern.conv.epilogue import store_statistics
from gpukern.conv.indexing import phase_taps, taps_inside
from gpukern.conv.norm_grad import along_pixels, inner_gradient, norm_numbers, store_norm_sums
from gpukern.conv.tf32 import rounded
from gpukern.ops._activation.functions import apply_activation
from gpukern.ops._pixels import split_pixel
from gpukern.ops._reduction.functions import merge_statistics, merge_sums


@triton.jit
def sum_over_taps(
    a_row, b_place, k_ok, b_mask, bits, taps_h, taps_w, steps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The product of [BLOCK_M, BLOCK_K] at ``a_row`` and [BLOCK_K, BLOCK_N] at ``b_place``, moved from tap to tap."""
    source_h, source_w, filter_r, filter_s = steps
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    r = tl.cast(0, INDEX)
    s = tl.cast(0, INDEX)
    for _ in tl.range(taps_h * taps_w, num_stages=STAGES):
        a_mask = ((bits & 1) != 0) & k_ok[None, :]
        a = tl.load(a_row + (r * source_h + s * source_w), mask=a_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        b = tl.load(b_place + (r * filter_r + s * filter_s), mask=b_mask, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(rounded(a, PRECISION), rounded(b, PRECISION), acc, input_precision=PRECISION)
        bits = bits >> 1
        # Selects, not a branch: after a branch the loads of a step would not be prefetched.
        wraps = s + 1 == taps_w
        r = tl.where(wraps, r + 1, r)
        s = tl.where(wraps, 0, s + 1)
    return acc


@triton.jit
def conv2d_block_diagonal_kernel(
    source,  # Image [N, C, H, W]: x, or ∂L/∂y when TRANSPOSED
    filter,  # Filter
    bias_ptr,  # [columns of all groups] or None
    residual_ptr,  # laid out like out, or None
    out,  # Image: y, or ∂L/∂x when TRANSPOSED
    statistics,  # Statistics, or Sums with a norm; or None
    z_ptr,  # laid out like out, with
    other_ptr,  # laid out like out or None, and
    norm,  # NormGrad; or all None
    sizes,  # Sizes
    padding_h,
    padding_w,
    negative_slope,
    TAPS_H: tl.constexpr,  # of these, at most 32
    TAPS_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    TAP_STEP_H: tl.constexpr,
    TAP_STEP_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    COLUMNS: tl.constexpr,  # channels of a group that are made, and summed over: powers of two
    REDUCTION: tl.constexpr,
    SOURCE_ALIGN: tl.constexpr,  # what the start of every run of channels is a multiple of, in elements
    FILTER_ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # BLOCK_N // COLUMNS = BLOCK_K // REDUCTION groups
    BLOCK_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):
    """out[pixel, column] = act(Σ_{tap, c} source[pixel moved by tap, c] · filter[tap, c, column] + bias + residual).

    Grid: (tiles, phases), the tiles of channels innermost; one phase unless TRANSPOSED with a stride. See ``indexing``
    for how taps and pixels belong together.
    """
    if TRANSPOSED:
        phase_h = tl.program_id(1) // STRIDE_W
        phase_w = tl.program_id(1) % STRIDE_W
        first_r, taps_h, base_h = phase_taps(phase_h, padding_h, TAPS_H, STRIDE_H, DILATION_H, TAP_STEP_H)
        first_s, taps_w, base_w = phase_taps(phase_w, padding_w, TAPS_W, STRIDE_W, DILATION_W, TAP_STEP_W)
        # Rows and columns of this phase, possibly none.
        rows = tl.cdiv(sizes.out_h - phase_h, STRIDE_H)
        cols = tl.cdiv(sizes.out_w - phase_w, STRIDE_W)
        ROW_STRIDE: tl.constexpr = 1
        COL_STRIDE: tl.constexpr = 1
        TAP_STRIDE_H: tl.constexpr = -(TAP_STEP_H * DILATION_H // STRIDE_H)
        TAP_STRIDE_W: tl.constexpr = -(TAP_STEP_W * DILATION_W // STRIDE_W)
    else:
        first_r, taps_h, base_h, rows = 0, TAPS_H, -padding_h, sizes.out_h
        first_s, taps_w, base_w, cols = 0, TAPS_W, -padding_w, sizes.out_w
        ROW_STRIDE: tl.constexpr = STRIDE_H
        COL_STRIDE: tl.constexpr = STRIDE_W
        TAP_STRIDE_H: tl.constexpr = DILATION_H
        TAP_STRIDE_W: tl.constexpr = DILATION_W

    num_n = tl.cdiv(sizes.groups * COLUMNS, BLOCK_N)
    pid_m = tl.program_id(0) // num_n
    pid_n = tl.program_id(0) % num_n
    pixels = sizes.batch * rows * cols
    pixel = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    n, i, j = split_pixel(pixel, tl.maximum(rows, 1), tl.maximum(cols, 1))
    # A pixel beyond the last is given a row that no tap can bring back into the image.
    h0 = tl.where(pixel < pixels, i * ROW_STRIDE + base_h, -(1 << 30))
    w0 = j * COL_STRIDE + base_w
    source_row = n.to(INDEX) * source.n + h0.to(INDEX) * source.h + w0.to(INDEX) * source.w
    column = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    column_ok = tl.max_constancy(column < sizes.groups * COLUMNS, OUT_ALIGN)
    k = pid_n * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    k_ok = tl.max_constancy(k < sizes.groups * REDUCTION, SOURCE_ALIGN)
    a_row = source.ptr + (tl.multiple_of(source_row, SOURCE_ALIGN)[:, None] + (k.to(INDEX) * source.c)[None, :])
    # Strides are multiples of the alignments, except those of 1. Dividing and multiplying shows that to the compiler.
    source_h = TAP_STRIDE_H * tl.cast(source.h // SOURCE_ALIGN * SOURCE_ALIGN, INDEX)
    source_w = TAP_STRIDE_W * tl.cast(source.w // SOURCE_ALIGN * SOURCE_ALIGN, INDEX)
    filter_group = filter.group // FILTER_ALIGN * FILTER_ALIGN
    filter_r = filter.r // FILTER_ALIGN * FILTER_ALIGN
    filter_s = filter.s // FILTER_ALIGN * FILTER_ALIGN
    if TRANSPOSED:
        filter_column = filter.column
        filter_reduction = filter.reduction // FILTER_ALIGN * FILTER_ALIGN
    else:
        filter_column = filter.column // FILTER_ALIGN * FILTER_ALIGN
        filter_reduction = filter.reduction
    b_column = column // COLUMNS * filter_group + column % COLUMNS * filter_column  # [BLOCK_N]
    b_column = filter.ptr + (b_column + (first_r * filter_r + first_s * filter_s))
    filter_r *= TAP_STEP_H
    filter_s *= TAP_STEP_W
    b_place = b_column[None, :] + (k % REDUCTION * filter_reduction)[:, None]  # [BLOCK_K, BLOCK_N]
    b_mask = (k // REDUCTION)[:, None] == (column // COLUMNS)[None, :]
    b_mask = b_mask & column_ok[None, :]

    MAX_TAPS_H: tl.constexpr = (TAPS_H + TAP_STEP_H - 1) // TAP_STEP_H
    MAX_TAPS_W: tl.constexpr = (TAPS_W + TAP_STEP_W - 1) // TAP_STEP_W
    # If the compiler had their number, it would unroll the loops, and the taps' addresses would fill the registers.
    taps_h = tl.where(sizes.batch > 0, taps_h, 0)
    bits = taps_inside(h0, w0, sizes, taps_h, taps_w, TAP_STRIDE_H, TAP_STRIDE_W, MAX_TAPS_H, MAX_TAPS_W, BLOCK_M)
    steps = (source_h, source_w, filter_r, filter_s)
    acc = sum_over_taps(
        a_row, b_place, k_ok, b_mask, bits, taps_h, taps_w, steps, BLOCK_M, BLOCK_N, PRECISION, INDEX, None
    )
    if tl.sum((acc != acc).to(tl.int32)) > 0:
        first = pid_n * (BLOCK_N // COLUMNS)
        for group in range(first, first + BLOCK_N // COLUMNS):
            own_k = k_ok & (k // REDUCTION == group)
            own = sum_over_taps(
                a_row, b_place, own_k, b_mask, bits, taps_h, taps_w, steps, BLOCK_M, BLOCK_N, PRECISION, INDEX, 1
            )
            acc = tl.where((column // COLUMNS == group)[None, :], own, acc)

    if TRANSPOSED:
        i = i * STRIDE_H + phase_h
        j = j * STRIDE_W + phase_w
    pixel_ok = (pixel < pixels)[:, None]
    out_ok = pixel_ok & column_ok[None, :]
    out_row = n.to(INDEX) * out.n + i.to(INDEX) * out.h + j.to(INDEX) * out.w
    place = tl.multiple_of(out_row, OUT_ALIGN)[:, None] + (column.to(INDEX) * out.c)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + place, mask=out_ok, other=0.0).to(tl.float32)
    channels = sizes.groups * COLUMNS
    if norm is not None:
        numbers = norm_numbers(norm, column, column_ok)
        z = tl.load(z_ptr + place, mask=out_ok, other=0.0).to(tl.float32)
        other = None
        if other_ptr is not None:
            other = tl.load(other_ptr + place, mask=out_ok, other=0.0).to(tl.float32)
        y, from_mean = inner_gradient(acc, z, other, along_pixels(numbers, 0), negative_slope, ACTIVATION)
    else:
        y = apply_activation(acc, ACTIVATION, negative_slope)
    y = y.to(out.ptr.dtype.element_ty)
    tl.store(out.ptr + place, y, mask=out_ok)
    if statistics is not None:
        row_tiles = tl.num_programs(0) // num_n
        row = tl.program_id(1) * row_tiles + pid_m
        rows = tl.num_programs(1) * row_tiles
        if norm is not None:
            g = y.to(tl.float32)
            store_norm_sums(g, from_mean, pixel_ok, numbers[1], statistics, row, rows, column, channels, AXIS=0)
            merge_sums(statistics, row, rows, pid_n, pid_n * BLOCK_N, channels, channels, 2, BLOCK_N)
        else:
            store_statistics(y.to(tl.float32), pixel_ok, statistics, row, rows, column, channels, AXIS=0)
            merge_statistics(statistics, row, rows, pid_n, pid_n * BLOCK_N, channels, channels, BLOCK_N)
