"""Convolution and its input gradient over boxes of pixels loaded by TMA: Hopper and newer.

A tile of output pixels is a box of images × rows × columns. The pixels that one tap reads are such a box again, moved;
TMA fills everything outside the image with zeros, so padding takes no instruction. Three things are less obvious, and
all of them decide how fast the compiled loop is:

- The product is transposed, [channels, pixels] = w · xᵀ: only then do both operands stay in shared memory.
- The filter's taps come first, [R, S, K, C]: dropping leading dimensions of one element costs nothing, others make
  Triton pass the tile through registers.
- At a stride of 2 an image of even size is taken as [N, H/2, 2, W/2, columns of both parities]: pixels of one parity
  are boxes, for x that is read and for ∂L/∂x that is written.
"""

import triton
import triton.language as tl

from gpukern.conv.epilogue import add_splits, pooled_columns, store_statistics
from gpukern.conv.indexing import phase_taps, tile_order
from gpukern.conv.norm_grad import along_pixels, inner_gradient, norm_numbers, store_norm_sums
from gpukern.conv.requantize import as_stored, before_storing, scaled, scaled_residual, sum_type
from gpukern.ops._reduction.functions import merge_statistics, merge_sums


@triton.jit
def conv2d_box_kernel(
    source,  # descriptor of x [N, H, W, C], in halves of rows and columns at STRIDE 2; of ∂L/∂y when TRANSPOSED
    filter,  # descriptor of w [R, S, K, C]
    bias_ptr,  # [columns] or None
    residual,  # descriptor like out, or None
    out,  # descriptor of y [N, P, Q, K]; of ∂L/∂x when TRANSPOSED, in halves of rows and columns at STRIDE 2
    statistics,  # Statistics, or Sums with a norm; or None
    z,  # descriptor like out, with
    other,  # descriptor like out or None, and
    norm,  # NormGrad; or all None
    shared,  # Shared of split_k.py, sums [tiles, SPLITS, BLOCK_N, BLOCK_M]; None for one split
    requantize,  # Requantize or None
    batch,
    rows,  # of the output, or of one of its phases
    cols,
    columns,  # channels made
    padding_h,
    padding_w,
    parity_step,  # elements from a pixel to its neighbour in the image that is taken in halves
    negative_slope,
    REDUCTION: tl.constexpr,  # channels summed over: a constant, else ptxas serializes the products
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    STRIDE: tl.constexpr,  # 1 or 2
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    PART_N: tl.constexpr,  # the box, or a half of it: the epilogue of a large tile takes too many registers at once
    PART_H: tl.constexpr,
    PART_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,  # programs that share the sum of a tile
    RUNS: tl.constexpr,  # in which the tensor cores sum, see float8_sums.py: 1, or a divisor of the steps of one split
    ACTIVATION: tl.constexpr,
    POOL: tl.constexpr,  # write the maxima of 2 × 2 pixels; rows, columns and those of a part are even
    PRECISION: tl.constexpr,
):
    """out[pixel, column] = act(Σ_{tap, c} source[pixel moved by tap, c] · filter[tap, c, column] + bias + residual).

    Grid: (tiles, phases, SPLITS); four phases if TRANSPOSED with STRIDE 2 (see ``indexing.py``), else one.
    """
    BLOCK_M: tl.constexpr = BOX_N * BOX_H * BOX_W
    PHASES: tl.constexpr = TRANSPOSED and STRIDE == 2
    # Not tl.cdiv: Triton 3.6 turns two constants into a tensor.
    STEPS: tl.constexpr = (REDUCTION + BLOCK_K - 1) // BLOCK_K
    TAP_STEP_H: tl.constexpr = 2 if PHASES and DILATION_H % 2 == 1 else 1
    TAP_STEP_W: tl.constexpr = 2 if PHASES and DILATION_W % 2 == 1 else 1

    tiles_w = tl.cdiv(cols, BOX_W)
    tiles_h = tl.cdiv(rows, BOX_H)
    num_m = tl.cdiv(batch, BOX_N) * tiles_h * tiles_w
    pid_m, pid_n = tile_order(tl.program_id(0), num_m, tl.cdiv(columns, BLOCK_N), GROUP_M)
    n0 = pid_m // tiles_w // tiles_h * BOX_N
    i0 = pid_m // tiles_w % tiles_h * BOX_H
    j0 = pid_m % tiles_w * BOX_W
    column0 = pid_n * BLOCK_N

    phase_h = 0
    phase_w = 0
    first_r = 0
    first_s = 0
    taps_h = TAPS_H
    taps_w = TAPS_W
    if PHASES:
        # The phase with most taps comes first, so that the programs that start last are short.
        phase_h = (tl.program_id(1) // 2 + padding_h) % 2
        phase_w = (tl.program_id(1) + padding_w) % 2
        first_r, taps_h, _ = phase_taps(phase_h, padding_h, TAPS_H, STRIDE, DILATION_H, TAP_STEP_H)
        first_s, taps_w, _ = phase_taps(phase_w, padding_w, TAPS_W, STRIDE, DILATION_W, TAP_STEP_W)
    r = first_r
    s = first_s
    c = 0
    steps = taps_h * taps_w * STEPS
    if SPLITS > 1:
        share = (steps + SPLITS - 1) // SPLITS
        begin = tl.program_id(2) * share
        c = begin % STEPS * BLOCK_K
        # A phase may have no taps: avoid a division by zero.
        r += begin // STEPS // max(taps_w, 1) * TAP_STEP_H
        s += begin // STEPS % max(taps_w, 1) * TAP_STEP_W
        steps = min(steps - begin, share)

    SUMS: tl.constexpr = sum_type(source.dtype, filter.dtype)
    acc = tl.zeros((BLOCK_N, BLOCK_M), SUMS)
    for _ in range(RUNS):
        total = acc
        if RUNS > 1:
            acc = tl.zeros((BLOCK_N, BLOCK_M), SUMS)
        for _ in range(steps // RUNS):
            if TRANSPOSED:
                # Even at STRIDE 2: for the taps of a phase.
                h = (phase_h + padding_h - r * DILATION_H) >> (STRIDE - 1)
                w = (phase_w + padding_w - s * DILATION_W) >> (STRIDE - 1)
            else:
                h = r * DILATION_H - padding_h
                w = s * DILATION_W - padding_w
            if STRIDE == 2 and not TRANSPOSED:
                # An arithmetic shift and a mask: right for rows and columns in the padding too.
                x = source.load([n0, i0 + (h >> 1), h & 1, j0 + (w >> 1), (w & 1) * parity_step + c])
            else:
                x = source.load([n0, i0 + h, j0 + w, c])
            x = x.reshape(BLOCK_M, BLOCK_K)
            if TRANSPOSED:
                f = filter.load([r, s, c, column0]).reshape(BLOCK_K, BLOCK_N).T  # [BLOCK_N, BLOCK_K]
            else:
                f = filter.load([r, s, column0, c]).reshape(BLOCK_N, BLOCK_K)
            acc = tl.dot(f, x.T, acc, input_precision=PRECISION, out_dtype=SUMS)
            # Running counters, as selects: after an `if` Triton would not prefetch the next steps' operands.
            c += BLOCK_K
            next_tap = c >= REDUCTION
            c = tl.where(next_tap, 0, c)
            s = tl.where(next_tap, s + TAP_STEP_W, s)
            next_row = s >= TAPS_W
            s = tl.where(next_row, first_s, s)
            r = tl.where(next_row, r + TAP_STEP_H, r)
        if RUNS > 1:
            acc += total

    column = column0 + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    last = True
    if SPLITS > 1:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        acc, last = add_splits(acc, shared.sums, shared.counters, tile, tl.program_id(2), SPLITS)
        # The other splits' writes fall beyond the last image, and beyond the last channel of the statistics.
        n0 = tl.where(last, n0, batch)
        column = tl.where(last, column, columns)
    row = tl.program_id(1) * num_m + pid_m  # of the tiles of all phases
    rows_of_tiles = tl.num_programs(1) * num_m
    sizes = (batch, rows, cols, columns)
    phase = (phase_h, phase_w * parity_step)
    PARTS: tl.constexpr = BLOCK_M // (PART_N * PART_H * PART_W)
    parts = (acc,)
    if PARTS == 2:
        parts = acc.reshape(BLOCK_N, 2, BLOCK_M // 2).permute(0, 2, 1).split()
    for part in tl.static_range(PARTS):
        # One dimension is halved: the others get no offset.
        place = (n0 + part * (BOX_N - PART_N), i0 + part * (BOX_H - PART_H), j0 + part * (BOX_W - PART_W), column0)
        finish(
            parts[part],
            bias_ptr,
            residual,
            out,
            statistics,
            z,
            other,
            norm,
            requantize,
            place,
            column,
            sizes,
            phase,
            row * PARTS + part,
            rows_of_tiles * PARTS,
            negative_slope,
            PHASES,
            PART_N,
            PART_H,
            PART_W,
            BLOCK_N,
            ACTIVATION,
            POOL,
        )
    if statistics is not None:  # noqa: SIM102 - at compile time, the other one is not
        if last:
            if norm is not None:
                merge_sums(statistics, row, rows_of_tiles, pid_n, column0, columns, columns, 2, BLOCK_N, PARTS)
            else:
                merge_statistics(statistics, row, rows_of_tiles, pid_n, column0, columns, columns, BLOCK_N, PARTS)


@triton.jit
def finish(
    acc,  # [BLOCK_N, PART_N · PART_H · PART_W]
    bias_ptr,
    residual,
    out,
    statistics,
    z,
    other,
    norm,
    requantize,
    place,  # the first image, row, column and channel
    column,  # [BLOCK_N]
    sizes,  # images, rows, columns and channels
    phase,  # row, and elements to the column
    tile,
    tiles,
    negative_slope,
    PHASES: tl.constexpr,
    PART_N: tl.constexpr,
    PART_H: tl.constexpr,
    PART_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    POOL: tl.constexpr,
):
    """Run the epilogue on a part of the tile, itself a box, and store it."""
    PIXELS: tl.constexpr = PART_N * PART_H * PART_W
    n0, i0, j0, column0 = place
    batch, rows, cols, columns = sizes
    acc = scaled(acc, requantize, column, column < columns, 1)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[:, None]
    if residual is not None:
        acc += scaled_residual(load_like_out(residual, place, phase, PHASES, PIXELS, BLOCK_N), requantize)
    if norm is not None:
        numbers = norm_numbers(norm, column, column < columns)
        values = load_like_out(z, place, phase, PHASES, PIXELS, BLOCK_N)
        kept = None
        if other is not None:
            kept = load_like_out(other, place, phase, PHASES, PIXELS, BLOCK_N)
        y, from_mean = inner_gradient(acc, values, kept, along_pixels(numbers, 1), negative_slope, ACTIVATION)
    else:
        y = before_storing(acc, requantize, ACTIVATION, negative_slope, out.dtype)
    if POOL:
        y = pooled_columns(y, PART_W)
    y = as_stored(y, requantize, out.dtype, ACTIVATION)
    if POOL:
        out.store([n0, i0 // 2, j0 // 2, column0], y.T.reshape(PART_N, PART_H // 2, PART_W // 2, BLOCK_N))
    elif PHASES:
        box = y.T.reshape(PART_N, PART_H, 1, PART_W, BLOCK_N)
        out.store([n0, i0, phase[0], j0, phase[1] + column0], box)
    else:
        out.store([n0, i0, j0, column0], y.T.reshape(PART_N, PART_H, PART_W, BLOCK_N))
    if statistics is not None:
        pixel = tl.arange(0, PIXELS)
        inside = (j0 + pixel % PART_W < cols) & (i0 + pixel // PART_W % PART_H < rows)
        inside = (inside & (n0 + pixel // (PART_W * PART_H) < batch))[None, :]
        if norm is not None:
            g = y.to(tl.float32)
            store_norm_sums(g, from_mean, inside, numbers[1], statistics, tile, tiles, column, columns, AXIS=1)
        else:
            store_statistics(y.to(tl.float32), inside, statistics, tile, tiles, column, columns, AXIS=1)


@triton.jit
def load_like_out(image, place, phase, PHASES: tl.constexpr, PIXELS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Load the box at ``place`` of a tensor that lies like the output, fp32 [BLOCK_N, PIXELS]."""
    n0, i0, j0, column0 = place
    box = image.load([n0, i0, phase[0], j0, phase[1] + column0]) if PHASES else image.load([n0, i0, j0, column0])
    return box.reshape(PIXELS, BLOCK_N).T.to(tl.float32)
