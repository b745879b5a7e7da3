"""Convolution of images with few channels, such as a network's first layer: Hopper and newer.

The taps of one filter row read S · C adjacent elements. After a pass over the small image, which pads it and gives each
pixel a few channels of zeros, the windows of all output pixels are one tensor from which TMA can load boxes,

    windows[n, p, r, q, i] = packed[((n · rows + p · stride_h + r) · columns + q · stride_w) · channels + i],  i < S · C

though they overlap: their strides are shorter than their sizes. So a tile's sum takes R steps of whole windows, where
implicit GEMM would compute an address for every tap and channel.
"""

import triton
import triton.language as tl

from gpukern.conv.families.tma_conv.kernels import finish
from gpukern.conv.indexing import inside_image, tile_order
from gpukern.ops._pixels import split_pixel
from gpukern.ops._reduction.functions import merge_statistics


@triton.jit
def conv2d_stem_kernel(
    windows,  # descriptor of [N, P, R, Q, S · C]
    filter,  # descriptor of [R, K, S · C]
    bias_ptr,  # [K] or None
    residual,  # descriptor like out, or None
    out,  # descriptor of y [N, P, Q, K]
    statistics,  # Statistics, or None
    requantize,  # Requantize or None
    batch,
    rows,
    cols,
    columns,
    negative_slope,
    TAPS_H: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # at least S · C: beyond them a window reads zeros
    GROUP_M: tl.constexpr,
    ACTIVATION: tl.constexpr,
    POOL: tl.constexpr,  # as in the box package
    PRECISION: tl.constexpr,
):
    """y = act(x ∗ w + bias + residual). Grid: tiles. Transposed as in the ``box`` package, and for the same reason."""
    BLOCK_M: tl.constexpr = BOX_N * BOX_H * BOX_W
    tiles_w = tl.cdiv(cols, BOX_W)
    tiles_h = tl.cdiv(rows, BOX_H)
    num_m = tl.cdiv(batch, BOX_N) * tiles_h * tiles_w
    pid_m, pid_n = tile_order(tl.program_id(0), num_m, tl.cdiv(columns, BLOCK_N), GROUP_M)
    n0 = pid_m // tiles_w // tiles_h * BOX_N
    p0 = pid_m // tiles_w % tiles_h * BOX_H
    q0 = pid_m % tiles_w * BOX_W
    column0 = pid_n * BLOCK_N

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for r in range(TAPS_H):
        x = windows.load([n0, p0, r, q0, 0]).reshape(BLOCK_M, BLOCK_K)
        f = filter.load([r, column0, 0]).reshape(BLOCK_N, BLOCK_K)
        acc = tl.dot(f, x.T, acc, input_precision=PRECISION)

    finish(
        acc,
        bias_ptr,
        residual,
        out,
        statistics,
        None,
        None,
        None,
        requantize,
        (n0, p0, q0, column0),
        column0 + tl.arange(0, BLOCK_N),
        (batch, rows, cols, columns),
        (0, 0),
        pid_m,
        num_m,
        negative_slope,
        PHASES=False,
        PART_N=BOX_N,
        PART_H=BOX_H,
        PART_W=BOX_W,
        BLOCK_N=BLOCK_N,
        ACTIVATION=ACTIVATION,
        POOL=POOL,
    )
    if statistics is not None:
        merge_statistics(statistics, pid_m, num_m, pid_n, column0, columns, columns, BLOCK_N)


@triton.jit
def stem_pack_kernel(
    source,  # Image [N, C, H, W], any strides
    filter,  # Image of [K, C, R, S], any strides
    packed_ptr,  # [N, rows, cols, CHANNELS]
    packed_filter_ptr,  # [R, K, BLOCK_K]
    sizes,  # Sizes: source_h × source_w is the image, out_h × out_w rows and columns of the packed one
    padding_h,
    padding_w,
    taps_h,
    taps_w,
    CHANNELS: tl.constexpr,  # of a packed pixel
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,  # at least CHANNELS
    INDEX: tl.constexpr,
):
    """packed = x in its padding, packed filter[r, k, s · CHANNELS + c] = w[k, c, r, s]; zeros elsewhere.

    Grid: a program for each BLOCK_M pixels, then one for each filter row and BLOCK_N output channels.
    """
    # In separate functions: the two sides of a branch may not use one name for two shapes.
    pixel_programs = tl.cdiv(sizes.batch * sizes.out_h * sizes.out_w, BLOCK_M)
    if tl.program_id(0) < pixel_programs:
        first = tl.program_id(0) * BLOCK_M
        _pack_pixels(source, packed_ptr, first, sizes, padding_h, padding_w, CHANNELS, BLOCK_M, BLOCK_C, INDEX)
    else:
        program = tl.program_id(0) - pixel_programs
        first = program // taps_h * BLOCK_N
        _pack_filters(
            filter, packed_filter_ptr, program % taps_h, first, sizes, taps_w, CHANNELS, BLOCK_N, BLOCK_K, INDEX
        )


@triton.jit
def _pack_pixels(
    source,
    packed_ptr,
    first,
    sizes,
    padding_h,
    padding_w,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    INDEX: tl.constexpr,
):
    c = tl.arange(0, BLOCK_C)[None, :]
    pixel = first + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    n, i, j = split_pixel(pixel, sizes.out_h, sizes.out_w)
    h = i - padding_h
    w = j - padding_w
    offset = n.to(INDEX) * source.n + h.to(INDEX) * source.h + w.to(INDEX) * source.w + c.to(INDEX) * source.c
    pixel_ok = pixel < sizes.batch * sizes.out_h * sizes.out_w
    inside = inside_image(h, w, sizes) & pixel_ok & (c < sizes.reduction)
    value = tl.load(source.ptr + offset, mask=inside, other=0.0)  # [BLOCK_M, BLOCK_C]
    tl.store(packed_ptr + pixel.to(INDEX) * CHANNELS + c, value, mask=pixel_ok & (c < CHANNELS))


@triton.jit
def _pack_filters(
    filter,
    packed_ptr,
    r,
    first,
    sizes,
    taps_w,
    CHANNELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INDEX: tl.constexpr,
):
    k = first + tl.arange(0, BLOCK_N)[:, None]  # [BLOCK_N, 1]
    i = tl.arange(0, BLOCK_K)[None, :]
    s = i // CHANNELS
    c = i % CHANNELS
    offset = k.to(INDEX) * filter.n + r * filter.h + s * filter.w + c * filter.c
    inside = (k < sizes.columns) & (s < taps_w) & (c < sizes.reduction)
    value = tl.load(filter.ptr + offset, mask=inside, other=0.0)  # [BLOCK_N, BLOCK_K]
    tl.store(packed_ptr + (r * sizes.columns + k) * BLOCK_K + i, value, mask=k < sizes.columns)
