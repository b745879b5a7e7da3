"""Weight-gradient kernel: sums over all pixels, shared by as many programs as keep the device busy."""

import triton
import triton.language as tl

from gpukern.conv.indexing import inside_image, tile_order
from gpukern.conv.tf32 import rounded
from gpukern.ops._pixels import split_pixel
from gpukern.ops._reduction.shared_sums import last_to_arrive, leave_part, total_of


@triton.jit(do_not_specialize=["fan_in"])
def conv2d_weight_grad_kernel(
    grad,  # Image [N, K, P, Q]: ∂L/∂y
    source,  # Image [N, C, H, W]: x
    out,  # Filter: ∂L/∂w
    shared,  # SharedSums of BLOCK_M · BLOCK_N a tile, or None for one split
    sizes,  # Sizes: out_h × out_w is P × Q, columns the output and reduction the input channels of a group
    pixels_per_split,
    padding_h,
    padding_w,
    fan_in,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    VARIANT: tl.constexpr,  # "taps": a column tile lies within one tap; "flat": it spans taps; "direct": see below
    GRAD_ALIGN: tl.constexpr,
    SOURCE_ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    CHUNK: tl.constexpr,  # see last_to_arrive
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):
    """out[k, c, r, s] = Σ_pixel grad[pixel, k] · source[pixel moved by tap (r, s), c].

    Grid: (tiles, groups, splits). Rows are output channels k, columns the (tap, c) of the filter, the sum runs over the
    pixels of dy. ``direct`` is for groups of few channels: a program takes one (tap, c) and BLOCK_M output channels of
    any groups, and multiplies element by element.
    """
    DIRECT: tl.constexpr = VARIANT == "direct"
    taps = TAPS_H * TAPS_W
    group = tl.program_id(1)
    rows = sizes.columns * sizes.groups if DIRECT else sizes.columns
    num_m = tl.cdiv(rows, BLOCK_M)
    if DIRECT:
        num_n = taps * sizes.reduction
    elif VARIANT == "flat":
        num_n = tl.cdiv(taps * sizes.reduction, BLOCK_N)
    else:
        num_n = taps * tl.cdiv(sizes.reduction, BLOCK_N)
    pid_m, pid_n = tile_order(tl.program_id(0), num_m, num_n, GROUP_M)

    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m_ok = tl.max_constancy(m < rows, GRAD_ALIGN)
    if DIRECT:
        tap = pid_n // sizes.reduction
        c = pid_n % sizes.reduction
        column_ok = m_ok[None, :]  # [1, BLOCK_M]
        source_channel = ((m // sizes.columns) * sizes.reduction + c)[None, :]  # [1, BLOCK_M]
    elif VARIANT == "flat":
        flat = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
        tap = flat // sizes.reduction
        c = flat % sizes.reduction
        column_ok = tap < taps
        source_channel = c
    else:
        tap = pid_n // tl.cdiv(sizes.reduction, BLOCK_N)
        c = (pid_n % tl.cdiv(sizes.reduction, BLOCK_N)) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        column_ok = tl.max_constancy(c < sizes.reduction, (1, SOURCE_ALIGN))
        source_channel = c
    r = tap // TAPS_W
    s = tap % TAPS_W
    source_column = source_channel.to(INDEX) * source.c
    grad_group = (group * sizes.columns).to(INDEX) * grad.c
    source_group = (group * sizes.reduction).to(INDEX) * source.c

    pixels = sizes.batch * sizes.out_h * sizes.out_w
    first = tl.program_id(2) * pixels_per_split
    last = min(first + pixels_per_split, pixels)
    acc = tl.zeros((BLOCK_K, BLOCK_M) if DIRECT else (BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_K):
        pixel = start + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        pixel_ok = pixel < last
        n, p, q = split_pixel(pixel, sizes.out_h, sizes.out_w)
        grad_row = n.to(INDEX) * grad.n + p.to(INDEX) * grad.h + q.to(INDEX) * grad.w
        h = (p * STRIDE_H - padding_h)[:, None] + r * DILATION_H  # [BLOCK_K, 1 or BLOCK_N]
        w = (q * STRIDE_W - padding_w)[:, None] + s * DILATION_W
        grad_row = tl.multiple_of(grad_row + grad_group, GRAD_ALIGN)
        source_pixel = (
            (source_group + n.to(INDEX) * source.n)[:, None] + h.to(INDEX) * source.h + w.to(INDEX) * source.w
        )
        if VARIANT != "flat":
            source_pixel = tl.multiple_of(source_pixel, (SOURCE_ALIGN, SOURCE_ALIGN))
        dy = tl.load(
            grad.ptr + grad_row[:, None] + (m.to(INDEX) * grad.c)[None, :],
            mask=pixel_ok[:, None] & m_ok[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_M]
        inside = inside_image(h, w, sizes) & pixel_ok[:, None] & column_ok
        x = tl.load(source.ptr + source_pixel + source_column, mask=inside, other=0.0)  # [BLOCK_K, BLOCK_N]
        if DIRECT:
            acc += dy.to(tl.float32) * x.to(tl.float32)
        else:
            # Not movable: loaded in the product's order, each element would need the address of a pixel of its own.
            dy = rounded(dy, PRECISION, MOVABLE=False)
            x = rounded(x, PRECISION, MOVABLE=False)
            acc = tl.dot(tl.trans(dy), x, acc, input_precision=PRECISION)

    sums = tl.sum(acc, axis=0)[:, None] if DIRECT else acc  # [BLOCK_M, BLOCK_N]
    if shared is None:
        row, column = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
        place, inside = _place(out, sizes, group, pid_m, pid_n, row, column, TAPS_H, TAPS_W, VARIANT, BLOCK_M, BLOCK_N)
        tl.store(place, sums.to(out.ptr.dtype.element_ty), mask=inside)
    else:
        SIZE: tl.constexpr = BLOCK_M * BLOCK_N
        tile = group * tl.num_programs(0) + tl.program_id(0)
        split, splits = tl.program_id(2), tl.num_programs(2)
        leave_part(sums, shared, tile, split, splits, fan_in, 0, SIZE)
        if last_to_arrive(shared, tile, split, splits, fan_in, SIZE, CHUNK):
            for start in range(0, SIZE, CHUNK):
                i = start + tl.arange(0, CHUNK)
                total = total_of(shared, tile, splits, fan_in, i, SIZE)
                row, column = i // BLOCK_N, i % BLOCK_N
                place, inside = _place(
                    out, sizes, group, pid_m, pid_n, row, column, TAPS_H, TAPS_W, VARIANT, BLOCK_M, BLOCK_N
                )
                tl.store(place, total.to(out.ptr.dtype.element_ty), mask=inside)


@triton.jit
def _place(
    out, sizes, group, pid_m, pid_n, row, column,
    TAPS_H: tl.constexpr, TAPS_W: tl.constexpr,
    VARIANT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return where a tile's sums belong in ∂L/∂w, and whether they are in there, by their row and column."""
    m = pid_m * BLOCK_M + row
    if VARIANT == "direct":
        row_ok = m < sizes.columns * sizes.groups
        place = out.ptr + (m // sizes.columns) * out.group + (m % sizes.columns) * out.column
        tap = pid_n // sizes.reduction
        c = pid_n % sizes.reduction
        column_ok = column == 0
    else:
        row_ok = m < sizes.columns
        place = out.ptr + group * out.group + m * out.column
        if VARIANT == "flat":
            flat = pid_n * BLOCK_N + column
            tap = flat // sizes.reduction
            c = flat % sizes.reduction
            column_ok = tap < TAPS_H * TAPS_W
        else:
            tap = pid_n // tl.cdiv(sizes.reduction, BLOCK_N)
            c = (pid_n % tl.cdiv(sizes.reduction, BLOCK_N)) * BLOCK_N + column
            column_ok = c < sizes.reduction
    return place + (tap // TAPS_W * out.r + tap % TAPS_W * out.s + c * out.reduction), row_ok & column_ok
