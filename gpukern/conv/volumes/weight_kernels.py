"""Weight-gradient kernel of volumes: sums over all voxels, shared by as many programs as keep the device busy."""

import triton
import triton.language as tl

from gpukern.conv.indexing import tile_order
from gpukern.conv.tf32 import rounded
from gpukern.conv.volumes.indexing import inside_volume
from gpukern.ops._pixels import split_voxel
from gpukern.ops._reduction.shared_sums import last_to_arrive, leave_part, total_of


@triton.jit(do_not_specialize=["fan_in"])
def conv3d_weight_grad_kernel(
    grad,  # Volume [N, K, Z, P, Q]: ∂L/∂y
    source,  # Volume [N, C, D, H, W]: x
    out,  # Filter: ∂L/∂w
    shared,  # SharedSums of BLOCK_M · BLOCK_N a tile, or None for one split
    sizes,  # Sizes: out is Z × P × Q, columns the output and reduction the input channels of a group
    voxels_per_split,
    padding_d,
    padding_h,
    padding_w,
    fan_in,
    TAPS: tl.constexpr,
    STRIDES: tl.constexpr,
    DILATIONS: tl.constexpr,
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
    """out[k, c, t, r, s] = Σ_voxel grad[voxel, k] · source[voxel moved by tap (t, r, s), c].

    Grid: (tiles, groups, splits). Rows are output channels k, columns the (tap, c) of the filter, the sum runs over the
    voxels of dy. ``direct`` is for groups of few channels: a program takes one (tap, c) and BLOCK_M output channels of
    any groups, and multiplies element by element.
    """
    DIRECT: tl.constexpr = VARIANT == "direct"
    taps = TAPS[0] * TAPS[1] * TAPS[2]
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
    else:
        tap, c, column_ok = _column(sizes, pid_n, tl.arange(0, BLOCK_N)[None, :], taps, VARIANT, BLOCK_N)
        if VARIANT == "taps":
            column_ok = tl.max_constancy(column_ok, (1, SOURCE_ALIGN))
        source_channel = c
    t = tap // (TAPS[1] * TAPS[2])
    r = tap // TAPS[2] % TAPS[1]
    s = tap % TAPS[2]
    source_column = source_channel.to(INDEX) * source.c
    grad_group = (group * sizes.columns).to(INDEX) * grad.c
    source_group = (group * sizes.reduction).to(INDEX) * source.c

    voxels = sizes.batch * sizes.out_d * sizes.out_h * sizes.out_w
    first = tl.program_id(2) * voxels_per_split
    last = min(first + voxels_per_split, voxels)
    acc = tl.zeros((BLOCK_K, BLOCK_M) if DIRECT else (BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_K):
        voxel = start + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        voxel_ok = voxel < last
        n, i, p, q = split_voxel(voxel, sizes.out_d, sizes.out_h, sizes.out_w)
        grad_row = n.to(INDEX) * grad.n + i.to(INDEX) * grad.d + p.to(INDEX) * grad.h + q.to(INDEX) * grad.w
        d = (i * STRIDES[0] - padding_d)[:, None] + t * DILATIONS[0]  # [BLOCK_K, 1 or BLOCK_N]
        h = (p * STRIDES[1] - padding_h)[:, None] + r * DILATIONS[1]
        w = (q * STRIDES[2] - padding_w)[:, None] + s * DILATIONS[2]
        grad_row = tl.multiple_of(grad_row + grad_group, GRAD_ALIGN)
        source_voxel = (source_group + n.to(INDEX) * source.n)[:, None] + d.to(INDEX) * source.d
        source_voxel += h.to(INDEX) * source.h + w.to(INDEX) * source.w
        if VARIANT != "flat":
            source_voxel = tl.multiple_of(source_voxel, (SOURCE_ALIGN, SOURCE_ALIGN))
        dy = tl.load(
            grad.ptr + grad_row[:, None] + (m.to(INDEX) * grad.c)[None, :],
            mask=voxel_ok[:, None] & m_ok[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_M]
        inside = inside_volume(d, h, w, sizes) & voxel_ok[:, None] & column_ok
        x = tl.load(source.ptr + source_voxel + source_column, mask=inside, other=0.0)  # [BLOCK_K, BLOCK_N]
        if DIRECT:
            acc += dy.to(tl.float32) * x.to(tl.float32)
        else:
            # Not movable: loaded in the product's order, each element would need the address of a voxel of its own.
            dy = rounded(dy, PRECISION, MOVABLE=False)
            x = rounded(x, PRECISION, MOVABLE=False)
            acc = tl.dot(tl.trans(dy), x, acc, input_precision=PRECISION)

    sums = tl.sum(acc, axis=0)[:, None] if DIRECT else acc  # [BLOCK_M, BLOCK_N]
    if shared is None:
        row, column = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
        place, inside = _place(out, sizes, group, pid_m, pid_n, row, column, TAPS, VARIANT, BLOCK_M, BLOCK_N)
        tl.store(place, sums.to(out.ptr.dtype.element_ty), mask=inside)
    else:
        SIZE: tl.constexpr = BLOCK_M * BLOCK_N
        tile = group * tl.num_programs(0) + tl.program_id(0)
        split, splits = tl.program_id(2), tl.num_programs(2)
        leave_part(sums, shared, tile, split, splits, fan_in, 0, SIZE)
        if last_to_arrive(shared, tile, split, splits, fan_in, SIZE, CHUNK):
            for start in range(0, SIZE, CHUNK):
                at = start + tl.arange(0, CHUNK)
                total = total_of(shared, tile, splits, fan_in, at, SIZE)
                row, column = at // BLOCK_N, at % BLOCK_N
                place, inside = _place(out, sizes, group, pid_m, pid_n, row, column, TAPS, VARIANT, BLOCK_M, BLOCK_N)
                tl.store(place, total.to(out.ptr.dtype.element_ty), mask=inside)


@triton.jit
def _column(sizes, pid_n, column, taps, VARIANT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return (tap, input channel, whether there is one) of a tile's ``column``."""
    if VARIANT == "direct":
        tap = pid_n // sizes.reduction
        c = pid_n % sizes.reduction
        column_ok = column == 0
    elif VARIANT == "flat":
        flat = pid_n * BLOCK_N + column
        tap = flat // sizes.reduction
        c = flat % sizes.reduction
        column_ok = tap < taps
    else:
        tap = pid_n // tl.cdiv(sizes.reduction, BLOCK_N)
        c = (pid_n % tl.cdiv(sizes.reduction, BLOCK_N)) * BLOCK_N + column
        column_ok = c < sizes.reduction
    return tap, c, column_ok


@triton.jit
def _place(
    out, sizes, group, pid_m, pid_n, row, column,
    TAPS: tl.constexpr, VARIANT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return where a tile's sums belong in ∂L/∂w, and whether they are in there, by their row and column."""
    m = pid_m * BLOCK_M + row
    if VARIANT == "direct":
        row_ok = m < sizes.columns * sizes.groups
        place = out.ptr + (m // sizes.columns) * out.group + (m % sizes.columns) * out.column
    else:
        row_ok = m < sizes.columns
        place = out.ptr + group * out.group + m * out.column
    tap, c, column_ok = _column(sizes, pid_n, column, TAPS[0] * TAPS[1] * TAPS[2], VARIANT, BLOCK_N)
    place += tap // (TAPS[1] * TAPS[2]) * out.t + tap // TAPS[2] % TAPS[1] * out.r + tap % TAPS[2] * out.s
    return place + c * out.reduction, row_ok & column_ok
