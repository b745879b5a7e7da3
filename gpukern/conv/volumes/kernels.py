"""Kernels of volumes: forward and input gradient as one implicit matrix product, as ``implicit_gemm/kernels.py``.

Layouts are strides: channels_last_3d is read and written in runs of channels, NCDHW and any view in what runs they
have. Triples are (depth, height, width). The weight gradient is in ``weight_kernels.py``.
"""

import triton
import triton.language as tl

from gpukern.conv.epilogue import add_splits
from gpukern.conv.indexing import phase_taps, tile_order
from gpukern.conv.tf32 import rounded
from gpukern.conv.volumes.indexing import inside_volume, taps_inside
from gpukern.ops._activation.functions import apply_activation
from gpukern.ops._pixels import split_voxel


@triton.jit
def conv3d_gather_kernel(
    source,  # Volume [N, C, D, H, W]: x, or ∂L/∂y when TRANSPOSED
    filter,  # Filter
    bias_ptr,  # [columns of all groups] or None
    residual,  # Volume of out's sizes, or None
    out,  # Volume: y, or ∂L/∂x when TRANSPOSED
    partial_ptr,  # fp32 [tiles, SPLITS, BLOCK_M, BLOCK_N], and
    counter_ptr,  # int32 [tiles], zeros; both None for one split
    sizes,  # Sizes
    padding_d,
    padding_h,
    padding_w,
    negative_slope,
    TAPS: tl.constexpr,
    STRIDES: tl.constexpr,
    DILATIONS: tl.constexpr,
    TAP_STEPS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    VARIANT: tl.constexpr,  # "taps", "flat" or "direct": how the sum over taps and channels is walked
    EVEN_K: tl.constexpr,  # BLOCK_K divides the channels summed over
    SOURCE_ALIGN: tl.constexpr,  # what the start of every run of channels is a multiple of, in elements;
    FILTER_ALIGN: tl.constexpr,  # see layouts.alignment
    OUT_ALIGN: tl.constexpr,
    RESIDUAL_ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,  # programs that share the sum of a tile; one unless VARIANT is "taps"
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):
    """out[voxel, column] = act(Σ_{tap, c} source[voxel moved by tap, c] · filter[tap, c, column] + bias + residual).

    Grid: (tiles, groups, phases · SPLITS); one phase unless TRANSPOSED with a stride. ``direct`` has all groups in one.
    """
    phase = tl.program_id(2) // SPLITS
    split = tl.program_id(2) % SPLITS
    if TRANSPOSED:
        phase_d = phase // (STRIDES[1] * STRIDES[2])
        phase_h = phase // STRIDES[2] % STRIDES[1]
        phase_w = phase % STRIDES[2]
        planes = (sizes.out_d - phase_d + STRIDES[0] - 1) // STRIDES[0]
        rows = (sizes.out_h - phase_h + STRIDES[1] - 1) // STRIDES[1]
        cols = (sizes.out_w - phase_w + STRIDES[2] - 1) // STRIDES[2]
        first_t, taps_d, base_d = phase_taps(phase_d, padding_d, TAPS[0], STRIDES[0], DILATIONS[0], TAP_STEPS[0])
        first_r, taps_h, base_h = phase_taps(phase_h, padding_h, TAPS[1], STRIDES[1], DILATIONS[1], TAP_STEPS[1])
        first_s, taps_w, base_w = phase_taps(phase_w, padding_w, TAPS[2], STRIDES[2], DILATIONS[2], TAP_STEPS[2])
        # The largest phase has as many tiles as the grid; the others leave their last programs without a voxel.
        largest = tl.cdiv(sizes.out_d, STRIDES[0]) * tl.cdiv(sizes.out_h, STRIDES[1]) * tl.cdiv(sizes.out_w, STRIDES[2])
        num_m = tl.cdiv(sizes.batch * largest, BLOCK_M)
        MOVE_D: tl.constexpr = 1
        MOVE_H: tl.constexpr = 1
        MOVE_W: tl.constexpr = 1
        TAP_STRIDE_D: tl.constexpr = -(TAP_STEPS[0] * DILATIONS[0] // STRIDES[0])
        TAP_STRIDE_H: tl.constexpr = -(TAP_STEPS[1] * DILATIONS[1] // STRIDES[1])
        TAP_STRIDE_W: tl.constexpr = -(TAP_STEPS[2] * DILATIONS[2] // STRIDES[2])
    else:
        planes = sizes.out_d
        rows = sizes.out_h
        cols = sizes.out_w
        first_t = 0
        first_r = 0
        first_s = 0
        taps_d = TAPS[0]
        taps_h = TAPS[1]
        taps_w = TAPS[2]
        base_d = -padding_d
        base_h = -padding_h
        base_w = -padding_w
        num_m = tl.cdiv(sizes.batch * planes * rows * cols, BLOCK_M)
        MOVE_D: tl.constexpr = STRIDES[0]
        MOVE_H: tl.constexpr = STRIDES[1]
        MOVE_W: tl.constexpr = STRIDES[2]
        TAP_STRIDE_D: tl.constexpr = DILATIONS[0]
        TAP_STRIDE_H: tl.constexpr = DILATIONS[1]
        TAP_STRIDE_W: tl.constexpr = DILATIONS[2]

    columns = sizes.columns * sizes.groups if VARIANT == "direct" else sizes.columns
    pid_m, pid_n = tile_order(tl.program_id(0), num_m, tl.cdiv(columns, BLOCK_N), GROUP_M)
    group = tl.program_id(1)

    voxels = sizes.batch * planes * rows * cols
    voxel = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    # A phase may have no planes: avoid a division by zero.
    n, i, j, k = split_voxel(voxel, tl.maximum(planes, 1), tl.maximum(rows, 1), tl.maximum(cols, 1))
    # A voxel beyond the last is given a plane that no tap can bring back into the volume.
    d0 = tl.where(voxel < voxels, i * MOVE_D + base_d, -(1 << 30))
    h0 = j * MOVE_H + base_h
    w0 = k * MOVE_W + base_w
    source_offset = (group * sizes.reduction).to(INDEX) * source.c + n.to(INDEX) * source.n + d0.to(INDEX) * source.d
    source_offset += h0.to(INDEX) * source.h + w0.to(INDEX) * source.w  # [BLOCK_M]
    # The hints reach the loads only on sums: a product with a stride of 1 is folded away, and its hint with it.
    source_row = source.ptr + tl.multiple_of(source_offset, SOURCE_ALIGN)

    column = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    column_ok = tl.max_constancy(column < columns, OUT_ALIGN)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if VARIANT == "direct":
        column_group = column // sizes.columns
        filter_offset = column_group.to(INDEX) * filter.group + (column % sizes.columns).to(INDEX) * filter.column
        source_channel = (column_group * sizes.reduction).to(INDEX) * source.c  # [BLOCK_N]
        for tap in range(taps_d * taps_h * taps_w):
            t = tap // (taps_h * taps_w)
            r = tap // taps_w % taps_h
            s = tap % taps_w
            d = d0 + t * TAP_STRIDE_D
            inside = inside_volume(d, h0 + r * TAP_STRIDE_H, w0 + s * TAP_STRIDE_W, sizes)
            mask = inside[:, None] & column_ok[None, :]
            moved = tl.cast(t * TAP_STRIDE_D, INDEX) * source.d
            moved += tl.cast(r * TAP_STRIDE_H, INDEX) * source.h + tl.cast(s * TAP_STRIDE_W, INDEX) * source.w
            taken = (first_t + t * TAP_STEPS[0]) * filter.t
            taken += (first_r + r * TAP_STEPS[1]) * filter.r + (first_s + s * TAP_STEPS[2]) * filter.s
            for c in range(sizes.reduction):
                shifted = source_channel + c * source.c
                a = tl.load(source_row[:, None] + moved + shifted[None, :], mask=mask, other=0.0)
                b = tl.load(filter.ptr + filter_offset + taken + c * filter.reduction, mask=column_ok, other=0.0)
                acc += a.to(tl.float32) * b.to(tl.float32)[None, :]
    else:
        filter_offset = group.to(INDEX) * filter.group + column.to(INDEX) * filter.column
        filter_column = filter.ptr + tl.multiple_of(filter_offset, FILTER_ALIGN)  # [BLOCK_N]
        lane = tl.arange(0, BLOCK_K)  # [BLOCK_K]
        if VARIANT == "flat":
            # Few channels: taps and channels form one reduction, separated by division.
            reduction = taps_d * taps_h * taps_w * sizes.reduction
            for step in range(tl.cdiv(reduction, BLOCK_K)):
                flat = step * BLOCK_K + lane
                flat_ok = flat < reduction
                tap = flat // sizes.reduction
                c = flat % sizes.reduction
                t = tap // (taps_h * taps_w)
                r = tap // taps_w % taps_h
                s = tap % taps_w
                dd = t * TAP_STRIDE_D
                dh = r * TAP_STRIDE_H
                dw = s * TAP_STRIDE_W
                inside = inside_volume(
                    d0[:, None] + dd[None, :], h0[:, None] + dh[None, :], w0[:, None] + dw[None, :], sizes
                )
                moved = c.to(INDEX) * source.c + dd.to(INDEX) * source.d
                moved += dh.to(INDEX) * source.h + dw.to(INDEX) * source.w
                taken = c.to(INDEX) * filter.reduction + (first_t + t * TAP_STEPS[0]).to(INDEX) * filter.t
                taken += (first_r + r * TAP_STEPS[1]).to(INDEX) * filter.r
                taken += (first_s + s * TAP_STEPS[2]).to(INDEX) * filter.s
                a = tl.load(source_row[:, None] + moved[None, :], mask=inside & flat_ok[None, :], other=0.0)
                b_mask = flat_ok[:, None] & column_ok[None, :]
                b = tl.load(filter_column[None, :] + taken[:, None], mask=b_mask, other=0.0)
                acc = tl.dot(rounded(a, PRECISION), rounded(b, PRECISION), acc, input_precision=PRECISION)
        else:
            # One flat loop over taps and channel blocks with running counters: the leanest form of the main loop.
            # Where there are at most 32 taps, which of them lie inside the volume is one bit mask a voxel.
            TAP_BITS: tl.constexpr = TAPS[0] * TAPS[1] * TAPS[2] <= 32
            # Upper bound on the taps of a phase. Not tl.cdiv: Triton 3.6 turns two constants into a tensor.
            MAX_TAPS_D: tl.constexpr = (TAPS[0] + TAP_STEPS[0] - 1) // TAP_STEPS[0]
            MAX_TAPS_H: tl.constexpr = (TAPS[1] + TAP_STEPS[1] - 1) // TAP_STEPS[1]
            MAX_TAPS_W: tl.constexpr = (TAPS[2] + TAP_STEPS[2] - 1) // TAP_STEPS[2]
            if TAP_BITS:
                bits = taps_inside(
                    d0, h0, w0, sizes, taps_d, taps_h, taps_w, TAP_STRIDE_D, TAP_STRIDE_H, TAP_STRIDE_W,
                    MAX_TAPS_D, MAX_TAPS_H, MAX_TAPS_W, BLOCK_M,
                )  # fmt: skip
            t = tl.cast(0, INDEX)
            r = tl.cast(0, INDEX)
            s = tl.cast(0, INDEX)
            c = tl.cast(0, INDEX)
            steps = taps_d * taps_h * taps_w * tl.cdiv(sizes.reduction, BLOCK_K)
            if SPLITS > 1:
                share = tl.cdiv(steps, SPLITS)
                first_step = split * share
                tap = first_step // tl.cdiv(sizes.reduction, BLOCK_K)
                c = (first_step % tl.cdiv(sizes.reduction, BLOCK_K) * BLOCK_K).to(INDEX)
                # A phase may have no taps: avoid a division by zero.
                s = (tap % max(taps_w, 1)).to(INDEX)
                r = (tap // max(taps_w, 1) % max(taps_h, 1)).to(INDEX)
                t = (tap // max(taps_w * taps_h, 1)).to(INDEX)
                if TAP_BITS:
                    # There is no step beyond the last tap; a shift by more bits than the mask has is undefined.
                    bits = bits >> min(tap, 31)
                steps = min(steps - first_step, share)
            for _ in range(steps):
                if TAP_BITS:
                    inside = (bits & 1) != 0  # [BLOCK_M, 1]
                else:
                    d = (d0 + t * TAP_STRIDE_D).to(tl.int32)
                    h = (h0 + r * TAP_STRIDE_H).to(tl.int32)
                    w = (w0 + s * TAP_STRIDE_W).to(tl.int32)
                    inside = inside_volume(d, h, w, sizes)[:, None]
                a_mask = inside
                b_mask = column_ok[None, :]
                if not EVEN_K:
                    lane_ok = tl.max_constancy(c + lane < sizes.reduction, SOURCE_ALIGN)
                    a_mask = a_mask & lane_ok[None, :]
                    b_mask = b_mask & lane_ok[:, None]
                moved = c * source.c + t * (TAP_STRIDE_D * source.d)
                moved += r * (TAP_STRIDE_H * source.h) + s * (TAP_STRIDE_W * source.w)
                taken = c * filter.reduction + (first_t + t * TAP_STEPS[0]) * filter.t
                taken += (first_r + r * TAP_STEPS[1]) * filter.r + (first_s + s * TAP_STEPS[2]) * filter.s
                a_offset = tl.multiple_of(moved + lane * source.c, SOURCE_ALIGN)
                b_offset = tl.multiple_of(taken + lane * filter.reduction, FILTER_ALIGN)
                a = tl.load(source_row[:, None] + a_offset[None, :], mask=a_mask, other=0.0)
                b = tl.load(filter_column[None, :] + b_offset[:, None], mask=b_mask, other=0.0)
                acc = tl.dot(rounded(a, PRECISION), rounded(b, PRECISION), acc, input_precision=PRECISION)
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
                next_plane = r == taps_h
                r = tl.where(next_plane, 0, r)
                t = tl.where(next_plane, t + 1, t)

    out_channel = group * sizes.columns + column
    if SPLITS > 1:
        tile = (phase * tl.num_programs(1) + group) * tl.num_programs(0) + tl.program_id(0)
        acc, last = add_splits(acc, partial_ptr, counter_ptr, tile, split, SPLITS)
        # The other splits have nothing to write.
        voxels = tl.where(last, voxels, 0)
    if TRANSPOSED:
        i = i * STRIDES[0] + phase_d
        j = j * STRIDES[1] + phase_h
        k = k * STRIDES[2] + phase_w
    out_ok = (voxel < voxels)[:, None] & column_ok[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + out_channel, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        place = _rows(residual, n, i, j, k, RESIDUAL_ALIGN, INDEX)
        place = place[:, None] + (out_channel.to(INDEX) * residual.c)[None, :]
        acc += tl.load(residual.ptr + place, mask=out_ok, other=0.0).to(tl.float32)
    y = apply_activation(acc, ACTIVATION, negative_slope)
    place = _rows(out, n, i, j, k, OUT_ALIGN, INDEX)[:, None] + (out_channel.to(INDEX) * out.c)[None, :]
    tl.store(out.ptr + place, y.to(out.ptr.dtype.element_ty), mask=out_ok)


@triton.jit
def _rows(volume, n, d, h, w, ALIGN: tl.constexpr, INDEX: tl.constexpr):
    """Return the offsets of voxels [BLOCK_M]."""
    offset = n.to(INDEX) * volume.n + d.to(INDEX) * volume.d + h.to(INDEX) * volume.h + w.to(INDEX) * volume.w
    return tl.multiple_of(offset, ALIGN)
