"""1×1 convolution of stride 1 as a matrix product of boxes loaded by TMA: Hopper and newer.

No pixel needs a neighbour, so the pixels of channels_last images are the rows of one matrix [pixels, C]; a
fully-connected layer is the same with images of one pixel. Dense NCHW images are matrices too, one [C, pixels] each.

Products are computed as [channels, pixels]: with either layout both operands then stay in shared memory, from where
the tensor cores read them. What a box holds beyond the end of a tensor is zero when read and dropped when written.
"""

import triton
import triton.language as tl

from gpukern.conv.epilogue import add_splits, store_statistics
from gpukern.conv.indexing import tile_order
from gpukern.conv.norm_grad import along_pixels, inner_gradient, norm_numbers, store_norm_sums
from gpukern.conv.requantize import as_stored, before_storing, scaled, scaled_residual, sum_type
from gpukern.ops._reduction.functions import merge_statistics, merge_sums
from gpukern.ops._reduction.shared_sums import last_to_arrive, leave_part, total_of


@triton.jit
def conv2d_gemm_kernel(
    source,  # descriptor of x [pixels, C], with PLANES [N, C, pixels]; of ∂L/∂y for the input gradient
    filter,  # descriptor of w [columns, reduction]; [reduction, columns] when FILTER_T
    bias_ptr,  # [columns] or None
    residual,  # descriptor like out, or None
    out,  # descriptor of y [pixels, K], with PLANES [N, K, pixels], a box of BLOCK_M / PARTS pixels; or of ∂L/∂x
    statistics,  # Statistics, or Sums with a norm; or None
    z,  # descriptor like out, with
    other,  # descriptor like out or None, and
    norm,  # NormGrad; or all None
    shared,  # Shared of split_k.py, sums [tiles, SPLITS, BLOCK_N, BLOCK_M]; None for one split
    requantize,  # Requantize or None
    images,  # 1 unless PLANES: all pixels are one image's
    pixels,  # of one image
    columns,  # channels made
    reduction,  # channels summed over
    negative_slope,
    PLANES: tl.constexpr,
    FILTER_T: tl.constexpr,
    BLOCK_M: tl.constexpr,  # pixels
    BLOCK_N: tl.constexpr,  # columns
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,  # programs that share the sum of a tile
    RUNS: tl.constexpr,  # in which the tensor cores sum, see float8_sums.py
    PARTS: tl.constexpr,  # 1, or 2: the pixels of a tile are finished one half after the other, in fewer registers
    PERSISTENT: tl.constexpr,  # a program takes as many tiles as there are; otherwise one
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[pixel, column] = act(Σ_c source[pixel, c] · filter[column, c] + bias[column] + residual[pixel, column]).

    Grid: (programs, SPLITS), with a program for each tile unless PERSISTENT. A persistent program fetches its next tile
    while the last one is still being written.
    """
    row_tiles = tl.cdiv(pixels, BLOCK_M)  # of one image
    num_m = images * row_tiles
    num_n = tl.cdiv(columns, BLOCK_N)
    # Splits of equal length: beyond the end a step adds zeros. A loop that may run zero times makes ptxas wait for
    # every single product.
    steps = tl.maximum(tl.cdiv(tl.cdiv(reduction, BLOCK_K), SPLITS * RUNS), 1)
    first = tl.program_id(1) * (steps * RUNS) if SPLITS > 1 else 0
    SUMS: tl.constexpr = sum_type(source.dtype, filter.dtype)
    # The compiler removes a loop of one iteration.
    turns = tl.cdiv(num_m * num_n - tl.program_id(0), tl.num_programs(0)) if PERSISTENT else 1
    for turn in range(turns):
        tile = tl.program_id(0) + turn * tl.num_programs(0)
        pid_m, pid_n = tile_order(tile, num_m, num_n, GROUP_M)
        image = pid_m // row_tiles
        pixel = pid_m % row_tiles * BLOCK_M
        column = pid_n * BLOCK_N
        acc = tl.zeros((BLOCK_N, BLOCK_M), SUMS)
        for run in range(RUNS):
            total = acc
            if RUNS > 1:
                acc = tl.zeros((BLOCK_N, BLOCK_M), SUMS)
            for step in range(steps):
                k = (first + run * steps + step) * BLOCK_K
                w = filter.load([k, column]).T if FILTER_T else filter.load([column, k])  # [BLOCK_N, BLOCK_K]
                x = source.load([image, k, pixel]).reshape(BLOCK_K, BLOCK_M) if PLANES else source.load([pixel, k]).T
                acc = tl.dot(w, x, acc, input_precision=PRECISION, out_dtype=SUMS)
            if RUNS > 1:
                acc += total
        last = True
        if SPLITS > 1:
            acc, last = add_splits(acc, shared.sums, shared.counters, tile, tl.program_id(1), SPLITS)
        if last:
            pieces = acc.reshape(BLOCK_N, 2, BLOCK_M // 2).permute(0, 2, 1).split() if PARTS == 2 else (acc,)
            for part in tl.static_range(PARTS):
                _finish(
                    pieces[part],
                    bias_ptr,
                    residual,
                    out,
                    statistics,
                    z,
                    other,
                    norm,
                    requantize,
                    image,
                    pixel + part * (BLOCK_M // PARTS),
                    pixels,
                    column,
                    columns,
                    pid_m * PARTS + part,
                    num_m * PARTS,
                    negative_slope,
                    PLANES,
                    ACTIVATION,
                )
            if norm is not None:
                merge_sums(statistics, pid_m, num_m, pid_n, column, columns, columns, 2, BLOCK_N, PARTS)
            elif statistics is not None:
                merge_statistics(statistics, pid_m, num_m, pid_n, column, columns, columns, BLOCK_N, PARTS)


@triton.jit
def _finish(
    acc,  # [columns, pixels] of the box that out describes
    bias_ptr,
    residual,
    out,
    statistics,
    z,
    other,
    norm,
    requantize,
    image,
    pixel,
    pixels,
    column,
    columns,
    row_tile,
    row_tiles,
    negative_slope,
    PLANES: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    BLOCK_N: tl.constexpr = acc.shape[0]
    BLOCK_M: tl.constexpr = acc.shape[1]
    channel = column + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    acc = scaled(acc, requantize, channel, channel < columns, 1)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + channel, mask=channel < columns, other=0.0).to(tl.float32)[:, None]
    if residual is not None:
        loaded = _load_like_out(residual, image, pixel, column, BLOCK_M, BLOCK_N, PLANES)
        acc += scaled_residual(loaded, requantize)
    if norm is not None:
        numbers = norm_numbers(norm, channel, channel < columns)
        values = _load_like_out(z, image, pixel, column, BLOCK_M, BLOCK_N, PLANES)
        kept = None
        if other is not None:
            kept = _load_like_out(other, image, pixel, column, BLOCK_M, BLOCK_N, PLANES)
        y, from_mean = inner_gradient(acc, values, kept, along_pixels(numbers, 1), negative_slope, ACTIVATION)
    else:
        y = before_storing(acc, requantize, ACTIVATION, negative_slope, out.dtype)
    y = as_stored(y, requantize, out.dtype, ACTIVATION)
    if PLANES:
        out.store([image, column, pixel], y.reshape(1, BLOCK_N, BLOCK_M))
    else:
        out.store([pixel, column], y.T)
    if statistics is not None:
        valid = (pixel + tl.arange(0, BLOCK_M) < pixels)[None, :]
        if norm is not None:
            g = y.to(tl.float32)
            store_norm_sums(g, from_mean, valid, numbers[1], statistics, row_tile, row_tiles, channel, columns, AXIS=1)
        else:
            store_statistics(y.to(tl.float32), valid, statistics, row_tile, row_tiles, channel, columns, AXIS=1)


@triton.jit
def _load_like_out(matrix, image, pixel, column, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PLANES: tl.constexpr):
    """Load a box of a tensor that lies like the output, fp32 [columns, pixels]."""
    if PLANES:
        return matrix.load([image, column, pixel]).reshape(BLOCK_N, BLOCK_M).to(tl.float32)
    else:
        return matrix.load([pixel, column]).T.to(tl.float32)


# Compiled for a single pixel, a case of its own otherwise, the loop would wait for its products one by one.
@triton.jit(do_not_specialize=["pixels", "fan_in"])
def conv2d_gemm_weight_grad_kernel(
    grad,  # descriptor of ∂L/∂y [pixels, K], with PLANES [N, K, pixels]
    source,  # descriptor of x [pixels, C], with PLANES [N, C, pixels]
    out,  # ∂L/∂w [K, C]: a descriptor, or a pointer where splits share sums
    shared,  # SharedSums of BLOCK_M · BLOCK_N a tile, or None for one split
    images,  # 1 unless PLANES
    pixels,  # of one image
    outputs,  # K
    inputs,  # C
    fan_in,
    PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr,  # output channels
    BLOCK_N: tl.constexpr,  # input channels
    BLOCK_K: tl.constexpr,  # pixels
    GROUP_M: tl.constexpr,
    CHUNK: tl.constexpr,  # see last_to_arrive
    PRECISION: tl.constexpr,
):
    """out[k, c] = Σ_pixel grad[pixel, k] · source[pixel, c]. Grid: (tiles, splits of the sum)."""
    pid_m, pid_n = tile_order(tl.program_id(0), tl.cdiv(outputs, BLOCK_M), tl.cdiv(inputs, BLOCK_N), GROUP_M)
    k = pid_m * BLOCK_M
    c = pid_n * BLOCK_N
    image_steps = tl.cdiv(pixels, BLOCK_K)
    steps = tl.maximum(tl.cdiv(images * image_steps, tl.num_programs(1)), 1)  # as above
    first = tl.program_id(1) * steps
    image = first // image_steps
    # A split may start beyond the last pixel, or with PLANES beyond the last image.
    pixel = (first % image_steps if PLANES else first) * BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(steps):
        if PLANES:
            dy = grad.load([image, k, pixel]).reshape(BLOCK_M, BLOCK_K)
            x = source.load([image, c, pixel]).reshape(BLOCK_N, BLOCK_K).T
        else:
            dy = grad.load([pixel, k]).T
            x = source.load([pixel, c])
        acc = tl.dot(dy, x, acc, input_precision=PRECISION)
        pixel += BLOCK_K
        if PLANES:
            # A select, not a branch: operands whose addresses come out of a branch are fetched too late.
            end = pixel >= pixels
            image = tl.where(end, image + 1, image)
            pixel = tl.where(end, 0, pixel)
    if shared is None:
        out.store([k, c], acc.to(out.dtype))
    else:
        SIZE: tl.constexpr = BLOCK_M * BLOCK_N
        tile, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
        leave_part(acc, shared, tile, split, splits, fan_in, 0, SIZE)
        if last_to_arrive(shared, tile, split, splits, fan_in, SIZE, CHUNK):
            for start in range(0, SIZE, CHUNK):
                i = start + tl.arange(0, CHUNK)
                total = total_of(shared, tile, splits, fan_in, i, SIZE)
                row = k + i // BLOCK_N
                column = c + i % BLOCK_N
                place = out + (row.to(tl.int64) * inputs + column)
                tl.store(place, total.to(out.dtype.element_ty), mask=(row < outputs) & (column < inputs))
