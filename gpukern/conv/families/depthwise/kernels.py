"""Depthwise convolution: forward and input gradient, element by element, each pixel read about once.

The unit of work is a group of a few neighbouring output columns (``lane`` in the code), walked down row by row. A row
of the source is multiplied, once loaded, into every output row that it reaches; their sums stay in registers until
their last source row has been added. So a tap costs one multiply-add, and loads, conversions and addresses are shared
by the taps of a window.

Tiles are [column groups, channels] for channels_last and [channels, column groups] for NCHW (PLANES), so that
neighbouring threads access neighbouring elements in both; below, SHAPE stands for either. Where two columns are always
adjacent, and both inside the image or both outside, they are loaded or stored as one (PAIRS): [..., 2].

Rows and columns are walked alike, along an ``Axis`` of ``plan.py``.
"""

import triton
import triton.language as tl

from gpukern.conv.families.depthwise.functions import (
    add_dot,
    dot,
    in_fours,
    is_first,
    packed,
    shift_at,
    shift_count,
    shift_index,
    word_count,
    word_start,
)
from gpukern.conv.norm_grad import along_pixels, inner_gradient, norm_numbers
from gpukern.conv.requantize import activated, scaled_residual
from gpukern.ops._reduction.functions import merge_statistics, merge_sums, store_part

# ---- along one axis: an Axis of plan.py ----------------------------------------------------------------------------


@triton.constexpr_function
def span(axis, outputs):
    return axis.span(outputs)


@triton.constexpr_function
def tap_of(axis, output, source):
    return axis.tap(output, source)


@triton.jit
def first_source(output, AXIS: tl.constexpr):
    """Return the first source that a tile from ``output`` on reads; may lie outside the image."""
    if AXIS.transposed:
        return (output + AXIS.before) // AXIS.ratio - AXIS.source_pitch * AXIS.back
    else:
        return output * AXIS.stride - AXIS.before


@triton.jit
def tiled(index, size, AXIS: tl.constexpr):
    """Return the first output of tile ``index`` of ``size`` outputs: the phases take turns."""
    return index % AXIS.out_pitch + index // AXIS.out_pitch * size * AXIS.out_pitch


@triton.jit
def lane_of(block, sizes, AXIS_W: tl.constexpr, COLS: tl.constexpr, BLOCK_Q: tl.constexpr, PLANES: tl.constexpr):
    """Return (image, first column of dy or y, whether it exists) per column group: [BLOCK_Q, 1] or [1, BLOCK_Q]."""
    lane = tl.arange(0, BLOCK_Q)
    lane = block * BLOCK_Q + (lane[None, :] if PLANES else lane[:, None])
    row = lanes_of_row(sizes, AXIS_W, COLS)
    n = lane // row
    return n, tiled(lane % row, COLS, AXIS_W), n < sizes.batch


@triton.jit
def lanes_of_row(sizes, AXIS_W: tl.constexpr, COLS: tl.constexpr):
    return AXIS_W.out_pitch * tl.cdiv(tl.cdiv(sizes.out_w, AXIS_W.out_pitch), COLS)


# ---- loads and stores ----------------------------------------------------------------------------------------------


@triton.jit
def inside(i, size):
    # Compared without sign, a negative index is larger than any size. A size of 1 is a plain number: cast() takes both.
    return tl.cast(i, tl.int32).to(tl.uint32, bitcast=True) < tl.cast(size, tl.uint32)


@triton.jit
def walk(
    image, n, c, row, column, PITCH_H: tl.constexpr, PITCH_W: tl.constexpr, PLANES: tl.constexpr, PAIRS: tl.constexpr,
    ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Return (pointers SHAPE or [..., 2], step along rows, step along columns or pairs of them).

    Strides are multiples of ALIGN, except the stride of 1. Dividing and multiplying by it shows that to the compiler.
    """
    stride_n = tl.cast(image.n, INDEX) // ALIGN * ALIGN
    stride_h = tl.cast(image.h, INDEX) // ALIGN * ALIGN
    if PLANES:
        stride_c = tl.cast(image.c, INDEX) // ALIGN * ALIGN
        stride_w = tl.cast(image.w, INDEX)
    else:
        stride_c = tl.cast(image.c, INDEX)
        stride_w = tl.cast(image.w, INDEX) // ALIGN * ALIGN
    pixel = n.to(INDEX) * stride_n + row.to(INDEX) * stride_h + column.to(INDEX) * stride_w
    offset = pixel + c.to(INDEX) * stride_c
    if PAIRS:
        # It is even; this shows it to the compiler.
        offset = (offset // 2 * 2)[:, :, None] + tl.arange(0, 2)[None, None, :]
    step_w = tl.cast(2, INDEX) if PAIRS else PITCH_W * stride_w
    return image.ptr + offset, PITCH_H * stride_h, step_w


@triton.jit
def places_inside(column, limit, c_ok, COUNT: tl.constexpr, PITCH: tl.constexpr, PAIRS: tl.constexpr):
    """Whether each of COUNT loads or stores beside one another lies left of ``limit``: SHAPE or [..., 1]."""
    result = ()
    for i in tl.static_range(COUNT):
        ok = inside(column + i * (2 if PAIRS else PITCH), limit) & c_ok
        result += (ok[:, :, None] if PAIRS else ok,)
    return result


@triton.jit
def load_rows(
    pointers, column, c_ok, row, height, width, step_h, step_w, step_c,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
    PITCH_H: tl.constexpr, PITCH_W: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """ROWS · CHANNELS · COLUMNS loads, zeros outside the image."""
    values = ()
    for i in tl.static_range(ROWS):
        # In a row outside the image, every column is outside.
        limit = tl.where(inside(row + i * PITCH_H, height), width, 0)
        ok = places_inside(column, limit, c_ok, COLUMNS, PITCH_W, PAIRS)
        for m in tl.static_range(CHANNELS):
            for e in tl.static_range(COLUMNS):
                at = pointers + (i * step_h + m * step_c + e * step_w)
                values += (tl.load(at, mask=ok[e], other=0.0),)
    return values


@triton.jit
def load_channels(ptr, k, k_ok, SHAPE: tl.constexpr, PAIRS: tl.constexpr):
    """Return a number for each channel in fp32, beside the stores: SHAPE or [..., 1]."""
    # Broadcast before the load: each thread reads what it needs, and no data is exchanged.
    values = tl.load(ptr + tl.broadcast_to(k, SHAPE), mask=k_ok, other=0.0).to(tl.float32)
    return values[:, :, None] if PAIRS else values


@triton.jit
def element(values, first, i, PAIRS: tl.constexpr):
    """Return the ``i``-th element of the loads from ``first`` on, in fp32: SHAPE."""
    if PAIRS:
        return tl.split(values[first + i // 2].to(tl.float32))[i % 2]
    else:
        return values[first + i].to(tl.float32)


@triton.jit
def multiply_rows(
    sums, values, weights,
    AXIS_H: tl.constexpr, AXIS_W: tl.constexpr, REDUCTION: tl.constexpr, COLS: tl.constexpr,
    LOADS: tl.constexpr, ODD: tl.constexpr, PAIRS: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Return ``sums`` [row · COLS + column] with the products of a step's loads added.

    FUSED asks for fused multiply-adds where the compiler is told not to make them of a product and a sum.
    """
    FIRST: tl.constexpr = -AXIS_H.warm_up * AXIS_H.outputs
    STEP: tl.constexpr = AXIS_H.sources
    SPAN: tl.constexpr = span(AXIS_W, COLS)
    TAPS_W: tl.constexpr = AXIS_W.taps
    TAPS: tl.constexpr = AXIS_H.taps * AXIS_W.taps
    for i in tl.static_range(STEP):
        for m in tl.static_range(REDUCTION):
            for e in tl.static_range(SPAN):
                v = element(values, (i * REDUCTION + m) * LOADS, e + ODD, PAIRS)
                new = ()
                for a in tl.static_range(len(sums)):
                    if tap_of(AXIS_H, FIRST + a // COLS, i) >= 0 and tap_of(AXIS_W, a % COLS, e) >= 0:
                        w = weights[
                            m * TAPS + tap_of(AXIS_H, FIRST + a // COLS, i) * TAPS_W + tap_of(AXIS_W, a % COLS, e)
                        ]
                        new += (tl.fma(v, w, sums[a]) if FUSED else sums[a] + v * w,)
                    else:
                        new += (sums[a],)
                sums = new
    return sums


@triton.jit
def multiply_words(sums, words, weights, AXIS_H: tl.constexpr, COLS: tl.constexpr, DOTS: tl.constexpr):
    """As multiply_rows of int8, in int32, of row_words and filter_words."""
    FIRST: tl.constexpr = -AXIS_H.warm_up * AXIS_H.outputs
    STEP: tl.constexpr = AXIS_H.sources
    WORDS: tl.constexpr = word_count(DOTS)
    SHIFTS: tl.constexpr = shift_count(DOTS)
    for i in tl.static_range(STEP):
        new = ()
        for a in tl.static_range(len(sums)):
            total = sums[a]
            if tap_of(AXIS_H, FIRST + a // COLS, i) >= 0:
                for n in tl.static_range(WORDS):
                    if shift_index(DOTS, a % COLS, n) >= 0:
                        w = weights[tap_of(AXIS_H, FIRST + a // COLS, i) * SHIFTS + shift_index(DOTS, a % COLS, n)]
                        if tap_of(AXIS_H, FIRST + a // COLS, i) == 0 and is_first(DOTS, a % COLS, n):
                            # The sum is zero: the first row of taps comes first.
                            total = dot(words[i * WORDS + n], w)
                        else:
                            total = add_dot(words[i * WORDS + n], w, total)
            new += (total,)
        sums = new
    return sums


@triton.jit
def row_words(values, ROWS: tl.constexpr, LOADS: tl.constexpr, DOTS: tl.constexpr):
    """Return ``values`` of load_rows as words [row · words + word]; without Dots as they are.

    In words they wait for their turn in a quarter of the registers.
    """
    if DOTS is None:
        return values
    else:
        WORDS: tl.constexpr = word_count(DOTS)
        words = ()
        for i in tl.static_range(ROWS):
            for n in tl.static_range(WORDS):
                words += (packed(values, i * LOADS, word_start(DOTS, n), LOADS, in_fours(DOTS)),)
        return words


@triton.jit
def filter_words(weights, AXIS_H: tl.constexpr, AXIS_W: tl.constexpr, DOTS: tl.constexpr):
    """Return int8 tiles of single taps as words [tap along rows · shifts + shift]."""
    TAPS_H: tl.constexpr = AXIS_H.taps
    TAPS_W: tl.constexpr = AXIS_W.taps
    SHIFTS: tl.constexpr = shift_count(DOTS)
    words = ()
    for r in tl.static_range(TAPS_H):
        for n in tl.static_range(SHIFTS):
            words += (packed(weights, r * TAPS_W, shift_at(DOTS, n), TAPS_W, in_fours(DOTS)),)
    return words


@triton.jit
def zeros(COUNT: tl.constexpr, SHAPE: tl.constexpr, DTYPE: tl.constexpr = tl.float32):
    """Return a tuple of zero tiles."""
    result = ()
    for _ in tl.static_range(COUNT):
        result += (tl.zeros(SHAPE, DTYPE),)
    return result


@triton.jit
def no_moments(SHAPE: tl.constexpr):
    """Return empty moments of a thread: first value, count, sum, sums of differences from the first and of squares."""
    none = tl.zeros(SHAPE, tl.float32)
    return none, none, none, none, none


@triton.jit
def add_moments(moments, y, ok, first):
    """Return ``moments`` with the values of ``y`` where ``ok`` added. ``first``: no value came before.

    The mean of n values lies within √n standard deviations of each, so that squares of differences from the first lose
    no more than a factor n in precision, where those of the values themselves can lose all of it.
    """
    origin, count, total, differences, squares = moments
    origin = tl.where(first, y, origin)
    d = tl.where(ok, y - origin, 0.0)
    count += ok.to(tl.float32)
    return origin, count, total + tl.where(ok, y, 0.0), differences + d, squares + d * d


@triton.jit
def over_pixels(lanes, PLANES: tl.constexpr):
    """Return the sum over the pixels of a tile, [1, channels] or [channels, 1]."""
    if len(lanes.shape) == 3:
        lanes = tl.sum(lanes, axis=2)
    return tl.sum(lanes, axis=1 if PLANES else 0, keep_dims=True)


@triton.jit
def store_moments(moments, statistics, tile, tiles, k, channels, PLANES: tl.constexpr):
    """Store what ``store_statistics`` stores for the other kernels, computed from moments."""
    origin, count, total, differences, squares = moments
    n = over_pixels(count, PLANES)
    sums = over_pixels(total, PLANES)
    mean = sums / tl.maximum(n, 1.0)
    if len(count.shape) == 3:
        mean = mean[:, :, None]
    own = tl.maximum(count, 1.0)
    apart = tl.where(count > 0.0, origin + differences / own - mean, 0.0)
    deviations = over_pixels(squares - differences * differences / own + count * apart * apart, PLANES)
    store_part(statistics.parts, (sums, deviations, n), tile, tiles, k, k < channels, channels)


# ---- forward and input gradient ------------------------------------------------------------------------------------


@triton.jit
def conv2d_depthwise_kernel(
    source,  # Image [N, C, H, W]: x, or ∂L/∂y if the axes are transposed
    filter,  # Filter
    bias_ptr,  # [columns of all groups] or None
    residual,  # Image like out, or None
    out,  # Image: y, or ∂L/∂x
    statistics,  # Statistics, or Sums with a norm; or None
    z,  # Image like out, with
    other,  # Image like out or None, and
    norm,  # NormGrad; or all None
    requantize,  # Requantize or None
    sizes,  # Sizes
    rows_per_program,  # output rows, a multiple of the stride of an input gradient
    negative_slope,
    AXIS_H: tl.constexpr, AXIS_W: tl.constexpr,
    COLUMNS: tl.constexpr, REDUCTION: tl.constexpr,  # channels of a group that are made, and summed over
    PLANES: tl.constexpr,
    SOURCE_PAIRS: tl.constexpr, OUT_PAIRS: tl.constexpr,
    SOURCE_ALIGN: tl.constexpr, OUT_ALIGN: tl.constexpr,  # see walk
    COLS: tl.constexpr,  # output columns of a column group
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,  # column groups and channels of a program
    DOTS: tl.constexpr,  # Dots of int8, or None
    ACTIVATION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """out[n, k, p, q] = act(Σ_{c, r, s} source[n, c, tap r of p, tap s of q] · filter[k, c, r, s] + bias + residual).

    Grid: tiles of rows_per_program · BLOCK_Q · COLS pixels × BLOCK_C channels, the channels innermost. Column groups
    continue from one image to the next, so that small images fill a tile too.
    """
    SHAPE: tl.constexpr = (BLOCK_C, BLOCK_Q) if PLANES else (BLOCK_Q, BLOCK_C)
    TAPS_H: tl.constexpr = AXIS_H.taps
    TAPS_W: tl.constexpr = AXIS_W.taps
    PITCH_H: tl.constexpr = AXIS_H.source_pitch
    WARM_UP: tl.constexpr = AXIS_H.warm_up
    STEP: tl.constexpr = AXIS_H.sources
    DONE: tl.constexpr = AXIS_H.outputs
    ODD: tl.constexpr = 1 if SOURCE_PAIRS and AXIS_W.first_is_odd else 0
    LOADS: tl.constexpr = (span(AXIS_W, COLS) + ODD + 1) // 2 if SOURCE_PAIRS else span(AXIS_W, COLS)
    STORES: tl.constexpr = COLS // 2 if OUT_PAIRS else COLS

    channels = sizes.groups * COLUMNS
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    rows = tl.cdiv(sizes.out_h, AXIS_H.out_pitch)
    strips = AXIS_H.out_pitch * tl.cdiv(rows, rows_per_program)
    tile = tl.program_id(0) // channel_blocks
    k = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    k = k[:, None] if PLANES else k[None, :]
    c_ok = tl.max_constancy(k < channels, (1, 1) if PLANES else (1, max(SOURCE_ALIGN, OUT_ALIGN)))
    n, out_column, lane_ok = lane_of(tile // strips, sizes, AXIS_W, COLS, BLOCK_Q, PLANES)
    # A column group with nothing to do gets a column that no tap can bring back into the image.
    out_column = tl.where(lane_ok, out_column, -(1 << 29))
    column = first_source(out_column, AXIS_W) - ODD
    out_row = tiled(tile % strips, rows_per_program, AXIS_H)
    row = first_source(out_row, AXIS_H)
    rows -= out_row // AXIS_H.out_pitch
    out_row -= WARM_UP * DONE * AXIS_H.out_pitch
    c = k // COLUMNS * REDUCTION

    # Broadcast before the load: each thread reads what it needs, and no data is exchanged.
    k_ok = tl.broadcast_to(k < channels, SHAPE)
    own_filter = filter.ptr + tl.broadcast_to(k // COLUMNS * filter.group + k % COLUMNS * filter.column, SHAPE)
    weights = ()
    for m in tl.static_range(REDUCTION):
        for r in tl.static_range(TAPS_H):
            for s in tl.static_range(TAPS_W):
                w = tl.load(own_filter + (m * filter.reduction + r * filter.r + s * filter.s), mask=k_ok, other=0.0)
                weights += (w if DOTS is not None else w.to(tl.float32),)
    if DOTS is not None:
        weights = filter_words(weights, AXIS_H, AXIS_W, DOTS)
    SUMS: tl.constexpr = tl.float32 if DOTS is None else tl.int32
    scale = None
    if requantize is not None:  # noqa: SIM102 - the attribute of None is looked up otherwise
        if requantize.scale is not None:
            scale = load_channels(requantize.scale, k, k_ok, SHAPE, OUT_PAIRS)
    if bias_ptr is not None:
        bias = load_channels(bias_ptr, k, k_ok, SHAPE, OUT_PAIRS)

    pointers, step_h, step_w = walk(
        source, n, c, row, column, PITCH_H, AXIS_W.source_pitch, PLANES, SOURCE_PAIRS, SOURCE_ALIGN, INDEX
    )
    step_c = tl.cast(source.c, INDEX)
    places, out_step_h, out_step_w = walk(
        out, n, k, out_row, out_column, AXIS_H.out_pitch, AXIS_W.out_pitch, PLANES, OUT_PAIRS, OUT_ALIGN, INDEX
    )
    if residual is not None:
        added, _, _ = walk(
            residual, n, k, out_row, out_column, AXIS_H.out_pitch, AXIS_W.out_pitch, PLANES, OUT_PAIRS, OUT_ALIGN, INDEX
        )
    OUT_SHAPE: tl.constexpr = (SHAPE[0], SHAPE[1], 2) if OUT_PAIRS else SHAPE
    if statistics is not None and norm is None:
        moments = no_moments(OUT_SHAPE)
    if norm is not None:
        own_numbers = norm_numbers(norm, k, k < channels)
        numbers = along_pixels(own_numbers, 2) if OUT_PAIRS else own_numbers
        z_places, _, _ = walk(
            z, n, k, out_row, out_column, AXIS_H.out_pitch, AXIS_W.out_pitch, PLANES, OUT_PAIRS, OUT_ALIGN, INDEX
        )
        if other is not None:
            other_places, _, _ = walk(
                other, n, k, out_row, out_column, AXIS_H.out_pitch, AXIS_W.out_pitch, PLANES, OUT_PAIRS, OUT_ALIGN,
                INDEX,
            )  # fmt: skip
        sum_g = tl.zeros(OUT_SHAPE, tl.float32)
        sum_gx = tl.zeros(OUT_SHAPE, tl.float32)

    sums = zeros(AXIS_H.waiting * COLS, SHAPE, SUMS)
    # The next rows are always in flight while the current ones are multiplied.
    loaded = load_rows(
        pointers, column, c_ok, row, sizes.source_h, sizes.source_w, step_h, step_w, step_c,
        STEP, LOADS, REDUCTION, PITCH_H, AXIS_W.source_pitch, SOURCE_PAIRS,
    )  # fmt: skip
    ahead = row_words(loaded, STEP, LOADS, DOTS)
    for t in range(tl.cdiv(min(rows_per_program, rows), DONE) + WARM_UP):
        values = ahead
        row += STEP * PITCH_H
        pointers += STEP * step_h
        loaded = load_rows(
            pointers, column, c_ok, row, sizes.source_h, sizes.source_w, step_h, step_w, step_c,
            STEP, LOADS, REDUCTION, PITCH_H, AXIS_W.source_pitch, SOURCE_PAIRS,
        )  # fmt: skip
        ahead = row_words(loaded, STEP, LOADS, DOTS)
        if DOTS is not None:
            sums = multiply_words(sums, values, weights, AXIS_H, COLS, DOTS)
        else:
            sums = multiply_rows(
                sums, values, weights, AXIS_H, AXIS_W, REDUCTION, COLS, LOADS, ODD, SOURCE_PAIRS, requantize is not None
            )
        for a in tl.static_range(DONE):
            row_ok = inside(out_row + a * AXIS_H.out_pitch, sizes.out_h) & (t >= WARM_UP)
            ok = places_inside(out_column, tl.where(row_ok, sizes.out_w, 0), c_ok, STORES, AXIS_W.out_pitch, OUT_PAIRS)
            for j in tl.static_range(STORES):
                moved = a * out_step_h + j * out_step_w
                y = tl.join(sums[a * COLS + 2 * j], sums[a * COLS + 2 * j + 1]) if OUT_PAIRS else sums[a * COLS + j]
                if DOTS is not None:
                    y = y.to(tl.float32)
                if scale is not None:
                    y = y * scale
                if bias_ptr is not None:
                    y += bias
                if residual is not None:
                    y += scaled_residual(tl.load(added + moved, mask=ok[j], other=0.0), requantize)
                if norm is not None:
                    value = tl.load(z_places + moved, mask=ok[j], other=0.0).to(tl.float32)
                    kept = None
                    if other is not None:
                        kept = tl.load(other_places + moved, mask=ok[j], other=0.0).to(tl.float32)
                    y, from_mean = inner_gradient(y, value, kept, numbers, negative_slope, ACTIVATION)
                    y = y.to(out.ptr.dtype.element_ty)
                else:
                    y = activated(y, requantize, ACTIVATION, negative_slope, out.ptr.dtype.element_ty)
                tl.store(places + moved, y, mask=ok[j])
                if norm is not None:
                    g = tl.where(ok[j], y.to(tl.float32), 0.0)
                    sum_g += g
                    sum_gx += g * from_mean
                if statistics is not None and norm is None:
                    moments = add_moments(moments, y.to(tl.float32), ok[j], (t == WARM_UP) & (a + j == 0))
        out_row += DONE * AXIS_H.out_pitch
        places += DONE * out_step_h
        if residual is not None:
            added += DONE * out_step_h
        if norm is not None:
            z_places += DONE * out_step_h
            if other is not None:
                other_places += DONE * out_step_h
        sums = sums[DONE * COLS :] + zeros(DONE * COLS, SHAPE, SUMS)
    if statistics is not None:
        tiles = tl.num_programs(0) // channel_blocks
        block = tl.program_id(0) % channel_blocks
        if norm is not None:
            total_g = over_pixels(sum_g, PLANES)
            total_gx = over_pixels(sum_gx, PLANES) * own_numbers[1]
            store_part(statistics.parts, (total_g, total_gx), tile, tiles, k, k < channels, channels)
            merge_sums(statistics, tile, tiles, block, block * BLOCK_C, channels, channels, 2, BLOCK_C)
        else:
            store_moments(moments, statistics, tile, tiles, k, channels, PLANES)
            merge_statistics(statistics, tile, tiles, block, block * BLOCK_C, channels, channels, BLOCK_C)
