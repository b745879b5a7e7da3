"""Kernels of one pass over a tensor: copies between layouts, and sums over pixels."""

import triton
import triton.language as tl

from gpukern.ops._activation.functions import activation_backward
from gpukern.ops._pixels import split_pixel
from gpukern.ops._reduction.shared_sums import last_to_arrive, leave_part, total_of


@triton.jit
def copy_image_kernel(
    source, out, pixels, channels, height, width, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, INDEX: tl.constexpr
):
    """out = source, both Image [N, C, H, W] with any strides. One tile is read along its runs and written along its."""
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    n, h, w = split_pixel(pixel, height, width)
    mask = (pixel < pixels)[:, None] & (c < channels)[None, :]
    read = n.to(INDEX) * source.n + h.to(INDEX) * source.h + w.to(INDEX) * source.w
    value = tl.load(source.ptr + read[:, None] + (c.to(INDEX) * source.c)[None, :], mask=mask, other=0.0)
    write = n.to(INDEX) * out.n + h.to(INDEX) * out.h + w.to(INDEX) * out.w
    tl.store(out.ptr + write[:, None] + (c.to(INDEX) * out.c)[None, :], value, mask=mask)


@triton.jit
def channel_sum_kernel(
    grad,  # Image [N, K, P, Q]: ∂L/∂y
    output,  # Image: y = act(z), or nothing (its ptr None)
    inner,  # Image: ∂L/∂z is written there; nothing without y
    out_ptr,  # [K]
    shared,  # SharedSums of BLOCK_M channels a tile, or None for one split
    pixels,
    channels,
    height,
    width,
    pixels_per_split,
    negative_slope,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INDEX: tl.constexpr,
):
    """out[k] = Σ_pixel grad[pixel, k] · act′. Grid: (channel tiles, splits)."""
    k = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    first = tl.program_id(1) * pixels_per_split
    last = min(first + pixels_per_split, pixels)
    acc = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    for start in range(first, last, BLOCK_K):
        pixel = start + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        n, p, q = split_pixel(pixel, height, width)
        row = n.to(INDEX) * grad.n + p.to(INDEX) * grad.h + q.to(INDEX) * grad.w
        mask = (pixel < last)[:, None] & (k < channels)[None, :]
        value = tl.load(grad.ptr + row[:, None] + (k.to(INDEX) * grad.c)[None, :], mask=mask, other=0.0).to(tl.float32)
        if output.ptr is not None:
            row = n.to(INDEX) * output.n + p.to(INDEX) * output.h + q.to(INDEX) * output.w
            place = row[:, None] + (k.to(INDEX) * output.c)[None, :]
            saved = tl.load(output.ptr + place, mask=mask, other=0.0).to(tl.float32)
            # The sum is of the stored values: the same bits as a separate pass over them.
            stored = activation_backward(value, saved, ACTIVATION, negative_slope).to(inner.ptr.dtype.element_ty)
            row = n.to(INDEX) * inner.n + p.to(INDEX) * inner.h + q.to(INDEX) * inner.w
            tl.store(inner.ptr + row[:, None] + (k.to(INDEX) * inner.c)[None, :], stored, mask=mask)
            # Beyond the last pixel an activation's derivative need not be zero times zero.
            value = tl.where(mask, stored.to(tl.float32), 0.0)
        acc += value
    total = tl.sum(acc, axis=0)
    last = True
    if shared is not None:
        tile, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
        leave_part(total[None, :], shared, tile, split, splits, None, 0, BLOCK_M)
        last = last_to_arrive(shared, tile, split, splits, None, BLOCK_M, BLOCK_M)
        if last:
            total = total_of(shared, tile, splits, None, tl.arange(0, BLOCK_M), BLOCK_M)
    tl.store(out_ptr + k, total.to(out_ptr.dtype.element_ty), mask=(k < channels) & last)
