"""Convolution kernels: forward and input gradient as one implicit matrix product.

Layouts are strides: channels_last is read and written in runs of channels, NCHW and any view in what runs they have.
The weight gradient is in ``weight_kernels.py``; the arithmetic of taps in ``indexing.py``.
"""

import triton
import triton.language as tl

from gpukern.conv.epilogue import add_splits, pooled_rows, store_statistics
from gpukern.conv.indexing import inside_image, phase_taps, taps_inside, tile_order
from gpukern.conv.norm_grad import along_pixels, inner_gradient, norm_numbers, store_norm_sums
from gpukern.conv.requantize import add_products, as_stored, before_storing, scaled, scaled_residual, sum_type
from gpukern.ops._pixels import split_pixel
from gpukern.ops._reduction.functions import merge_statistics, merge_sums


@triton.jit
def conv2d_gather_kernel(
    source,  # Image [N, C, H, W]: x, or ∂L/∂y when TRANSPOSED
    filter,  # Filter
    bias_ptr,  # [columns of all groups] or None
    residual_ptr,  # laid out like out, or None
    out,  # Image: y, or ∂L/∂x when TRANSPOSED
    statistics,  # Statistics, or Sums with a norm; or None
    z_ptr,  # laid out like out, with
    other_ptr,  # laid out like out or None, and
    norm,  # NormGrad; or all None
    parts,  # Parts of split_k.py; None for one split
    requantize,  # Requantize or None
    sizes,  # Sizes
    padding_h,
    padding_w,
    negative_slope,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    TAP_STEP_H: tl.constexpr,
    TAP_STEP_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    VARIANT: tl.constexpr,  # "taps", "flat" or "direct": how the sum over taps and channels is walked
    EVEN_K: tl.constexpr,  # BLOCK_K divides the channels summed over
    SOURCE_ALIGN: tl.constexpr,  # what the start of every run of channels is a multiple of, in elements;
    FILTER_ALIGN: tl.constexpr,  # see launch.alignment
    OUT_ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,  # programs that share the sum of a tile; one unless VARIANT is "taps"
    ACTIVATION: tl.constexpr,
    POOL: tl.constexpr,  # out is of the maxima of 2 × 2 pixels: those of one are neighbouring rows of the tile
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):
    """out[pixel, column] = act(Σ_{tap, c} source[pixel moved by tap, c] · filter[tap, c, column] + bias + residual).

    Grid: (tiles, groups, phases · SPLITS); one phase unless TRANSPOSED with a stride. ``direct`` has all groups in one.
    """
    phase = tl.program_id(2) // SPLITS
    split = tl.program_id(2) % SPLITS
    if TRANSPOSED:
        phase_h = phase // STRIDE_W
        phase_w = phase % STRIDE_W
        rows = (sizes.out_h - phase_h + STRIDE_H - 1) // STRIDE_H
        cols = (sizes.out_w - phase_w + STRIDE_W - 1) // STRIDE_W
        first_r, taps_h, base_h = phase_taps(phase_h, padding_h, TAPS_H, STRIDE_H, DILATION_H, TAP_STEP_H)
        first_s, taps_w, base_w = phase_taps(phase_w, padding_w, TAPS_W, STRIDE_W, DILATION_W, TAP_STEP_W)
        # The largest phase has as many tiles as the grid; the others leave their last programs without a pixel.
        num_m = tl.cdiv(sizes.batch * tl.cdiv(sizes.out_h, STRIDE_H) * tl.cdiv(sizes.out_w, STRIDE_W), BLOCK_M)
        ROW_STRIDE: tl.constexpr = 1
        COL_STRIDE: tl.constexpr = 1
        TAP_STRIDE_H: tl.constexpr = -(TAP_STEP_H * DILATION_H // STRIDE_H)
        TAP_STRIDE_W: tl.constexpr = -(TAP_STEP_W * DILATION_W // STRIDE_W)
    else:
        rows = sizes.out_h
        cols = sizes.out_w
        if POOL:
            rows = 2 * rows
            cols = 2 * cols
        first_r = 0
        first_s = 0
        taps_h = TAPS_H
        taps_w = TAPS_W
        base_h = -padding_h
        base_w = -padding_w
        num_m = tl.cdiv(sizes.batch * rows * cols, BLOCK_M)
        ROW_STRIDE: tl.constexpr = STRIDE_H
        COL_STRIDE: tl.constexpr = STRIDE_W
        TAP_STRIDE_H: tl.constexpr = DILATION_H
        TAP_STRIDE_W: tl.constexpr = DILATION_W

    columns = sizes.columns * sizes.groups if VARIANT == "direct" else sizes.columns
    pid_m, pid_n = tile_order(tl.program_id(0), num_m, tl.cdiv(columns, BLOCK_N), GROUP_M)
    group = tl.program_id(1)

    pixels = sizes.batch * rows * cols
    pixel = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    if POOL:
        n, i, j = split_pixel(pixel // 4, sizes.out_h, sizes.out_w)
        i = 2 * i + pixel % 4 // 2
        j = 2 * j + pixel % 2
    else:
        # A phase may have no rows: avoid a division by zero.
        n, i, j = split_pixel(pixel, tl.maximum(rows, 1), tl.maximum(cols, 1))
    # A pixel beyond the last is given a row that no tap can bring back into the image.
    h0 = tl.where(pixel < pixels, i * ROW_STRIDE + base_h, -(1 << 30))
    w0 = j * COL_STRIDE + base_w
    source_offset = (group * sizes.reduction).to(INDEX) * source.c + n.to(INDEX) * source.n
    source_offset += h0.to(INDEX) * source.h + w0.to(INDEX) * source.w  # [BLOCK_M]
    # The hints reach the loads only on sums: a product with a stride of 1 is folded away, and its hint with it.
    source_row = source.ptr + tl.multiple_of(source_offset, SOURCE_ALIGN)

    column = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    column_ok = tl.max_constancy(column < columns, OUT_ALIGN)

    SUMS: tl.constexpr = sum_type(source.ptr.dtype.element_ty, filter.ptr.dtype.element_ty)
    acc = tl.zeros((BLOCK_M, BLOCK_N), SUMS)
    if VARIANT == "direct":
        column_group = column // sizes.columns
        filter_offset = column_group.to(INDEX) * filter.group + (column % sizes.columns).to(INDEX) * filter.column
        source_channel = (column_group * sizes.reduction).to(INDEX) * source.c  # [BLOCK_N]
        for r in range(taps_h):
            for s in range(taps_w):
                h = h0 + r * TAP_STRIDE_H
                w = w0 + s * TAP_STRIDE_W
                mask = inside_image(h, w, sizes)[:, None] & column_ok[None, :]
                moved = tl.cast(r * TAP_STRIDE_H, INDEX) * source.h + tl.cast(s * TAP_STRIDE_W, INDEX) * source.w
                taken = (first_r + r * TAP_STEP_H) * filter.r + (first_s + s * TAP_STEP_W) * filter.s
                for c in range(sizes.reduction):
                    shifted = source_channel + c * source.c
                    a = tl.load(source_row[:, None] + moved + shifted[None, :], mask=mask, other=0.0)
                    b = tl.load(filter.ptr + filter_offset + taken + c * filter.reduction, mask=column_ok, other=0.0)
                    acc += a.to(SUMS) * b.to(SUMS)[None, :]
    else:
        filter_offset = group.to(INDEX) * filter.group + column.to(INDEX) * filter.column
        filter_column = filter.ptr + tl.multiple_of(filter_offset, FILTER_ALIGN)  # [BLOCK_N]
        k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
        if VARIANT == "flat":
            # Few channels: taps and channels form one reduction, separated by division.
            reduction = taps_h * taps_w * sizes.reduction
            for step in range(tl.cdiv(reduction, BLOCK_K)):
                flat = step * BLOCK_K + k
                flat_ok = flat < reduction
                tap = flat // sizes.reduction
                c = flat % sizes.reduction
                r = tap // taps_w
                s = tap % taps_w
                dh = r * TAP_STRIDE_H
                dw = s * TAP_STRIDE_W
                inside = inside_image(h0[:, None] + dh[None, :], w0[:, None] + dw[None, :], sizes) & flat_ok[None, :]
                moved = c.to(INDEX) * source.c + dh.to(INDEX) * source.h + dw.to(INDEX) * source.w
                taken = (
                    c.to(INDEX) * filter.reduction
                    + (first_r + r * TAP_STEP_H).to(INDEX) * filter.r
                    + (first_s + s * TAP_STEP_W).to(INDEX) * filter.s
                )
                a = tl.load(source_row[:, None] + moved[None, :], mask=inside, other=0.0)
                b_mask = flat_ok[:, None] & column_ok[None, :]
                b = tl.load(filter_column[None, :] + taken[:, None], mask=b_mask, other=0.0)
                acc = add_products(a, b, acc, PRECISION)
        else:
            # One flat loop over taps and channel blocks with running counters: the leanest form of the main loop.
            # Where there are at most 32 taps, which of them lie inside the image is one bit mask a pixel.
            TAP_BITS: tl.constexpr = TAPS_H * TAPS_W <= 32
            # Upper bound on the taps of a phase. Not tl.cdiv: Triton 3.6 turns two constants into a tensor.
            MAX_TAPS_H: tl.constexpr = (TAPS_H + TAP_STEP_H - 1) // TAP_STEP_H
            MAX_TAPS_W: tl.constexpr = (TAPS_W + TAP_STEP_W - 1) // TAP_STEP_W
            if TAP_BITS:
                bits = taps_inside(
                    h0, w0, sizes, taps_h, taps_w, TAP_STRIDE_H, TAP_STRIDE_W, MAX_TAPS_H, MAX_TAPS_W, BLOCK_M
                )
            r = tl.cast(0, INDEX)
            s = tl.cast(0, INDEX)
            c = tl.cast(0, INDEX)
            steps = taps_h * taps_w * tl.cdiv(sizes.reduction, BLOCK_K)
            if SPLITS > 1:
                share = tl.cdiv(steps, SPLITS)
                first_step = split * share
                tap = first_step // tl.cdiv(sizes.reduction, BLOCK_K)
                c = (first_step % tl.cdiv(sizes.reduction, BLOCK_K) * BLOCK_K).to(INDEX)
                # A phase may have no taps: avoid a division by zero.
                s = (tap % max(taps_w, 1)).to(INDEX)
                r = (tap // max(taps_w, 1)).to(INDEX)
                if TAP_BITS:
                    # There is no step beyond the last tap; a shift by more bits than the mask has is undefined.
                    bits = bits >> min(tap, 31)
                steps = min(steps - first_step, share)
            for _ in range(steps):
                if TAP_BITS:
                    inside = (bits & 1) != 0  # [BLOCK_M, 1]
                else:
                    h = (h0 + r * TAP_STRIDE_H).to(tl.int32)
                    w = (w0 + s * TAP_STRIDE_W).to(tl.int32)
                    inside = inside_image(h, w, sizes)[:, None]
                a_mask = inside
                b_mask = column_ok[None, :]
                if not EVEN_K:
                    k_ok = tl.max_constancy(c + k < sizes.reduction, SOURCE_ALIGN)
                    a_mask = a_mask & k_ok[None, :]
                    b_mask = b_mask & k_ok[:, None]
                moved = c * source.c + r * (TAP_STRIDE_H * source.h) + s * (TAP_STRIDE_W * source.w)
                taken = c * filter.reduction + (first_r + r * TAP_STEP_H) * filter.r
                taken += (first_s + s * TAP_STEP_W) * filter.s
                a_offset = tl.multiple_of(moved + k * source.c, SOURCE_ALIGN)
                b_offset = tl.multiple_of(taken + k * filter.reduction, FILTER_ALIGN)
                a = tl.load(source_row[:, None] + a_offset[None, :], mask=a_mask, other=0.0)
                b = tl.load(filter_column[None, :] + b_offset[:, None], mask=b_mask, other=0.0)
                acc = add_products(a, b, acc, PRECISION)
                # Selects, not branches: after a branch Triton fetches each step's operands when they are needed, and
                # none ahead.
                c += BLOCK_K
                next_tap = c >= sizes.reduction
                c = tl.where(next_tap, 0, c)
                s = tl.where(next_tap, s + 1, s)
                if TAP_BITS:
                    bits = bits >> next_tap.to(tl.int32)
                next_row = s == taps_w
                s = tl.where(next_row, 0, s)
                r = tl.where(next_row, r + 1, r)

    out_channel = group * sizes.columns + column
    last = True
    if SPLITS > 1:
        tile = (phase * tl.num_programs(1) + group) * tl.num_programs(0) + tl.program_id(0)
        acc, last = add_splits(acc, parts.sums, parts.counters, tile, split, SPLITS)
        # The other splits have nothing to write.
        pixels = tl.where(last, pixels, 0)
    if POOL:
        pixels = pixels // 4
        pixel = pid_m * (BLOCK_M // 4) + tl.arange(0, BLOCK_M // 4)
        n, i, j = split_pixel(pixel, sizes.out_h, sizes.out_w)
    pixel_ok = (pixel < pixels)[:, None]
    if TRANSPOSED:
        i = i * STRIDE_H + phase_h
        j = j * STRIDE_W + phase_w
    out_ok = pixel_ok & column_ok[None, :]
    acc = scaled(acc, requantize, out_channel, column_ok, 0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + out_channel, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    out_offset = n.to(INDEX) * out.n + i.to(INDEX) * out.h + j.to(INDEX) * out.w
    out_row = tl.multiple_of(out_offset, OUT_ALIGN)
    place = out_row[:, None] + (out_channel.to(INDEX) * out.c)[None, :]
    if residual_ptr is not None:
        acc += scaled_residual(tl.load(residual_ptr + place, mask=out_ok, other=0.0), requantize)
    if norm is not None:
        numbers = norm_numbers(norm, out_channel, column_ok)
        z = tl.load(z_ptr + place, mask=out_ok, other=0.0).to(tl.float32)
        other = None
        if other_ptr is not None:
            other = tl.load(other_ptr + place, mask=out_ok, other=0.0).to(tl.float32)
        y, from_mean = inner_gradient(acc, z, other, along_pixels(numbers, 0), negative_slope, ACTIVATION)
    else:
        y = before_storing(acc, requantize, ACTIVATION, negative_slope, out.ptr.dtype.element_ty)
    if POOL:
        y = pooled_rows(y)
    y = as_stored(y, requantize, out.ptr.dtype.element_ty, ACTIVATION)
    tl.store(out.ptr + place, y, mask=out_ok)
    if statistics is not None:
        channels = sizes.columns * sizes.groups
        # Where there is nothing to write the channel is one too far.
        channel = tl.where(column_ok, out_channel, channels)
        if last:
            row = phase * num_m + pid_m
            rows = tl.num_programs(2) // SPLITS * num_m
            column_tile = group * tl.cdiv(columns, BLOCK_N) + pid_n
            first = group * sizes.columns + pid_n * BLOCK_N
            end = group * sizes.columns + columns
            if norm is not None:
                g = y.to(tl.float32)
                store_norm_sums(g, from_mean, pixel_ok, numbers[1], statistics, row, rows, channel, channels, AXIS=0)
                merge_sums(statistics, row, rows, column_tile, first, end, channels, 2, BLOCK_N)
            else:
                store_statistics(y.to(tl.float32), pixel_ok, statistics, row, rows, channel, channels, AXIS=0)
                merge_statistics(statistics, row, rows, column_tile, first, end, channels, BLOCK_N)
