"""The weight gradient of a depthwise convolution: one sum over all pixels for each tap, side by side in registers."""

import triton
import triton.language as tl

from gpukern.conv.families.depthwise.kernels import (
    element,
    first_source,
    inside,
    lane_of,
    lanes_of_row,
    load_rows,
    over_pixels,
    span,
    tiled,
    walk,
    zeros,
)
from gpukern.ops._reduction.shared_sums import last_to_arrive, leave_part, total_of


@triton.constexpr_function
def source_of(axis, output, tap, sources):
    """Invert ``tap_of``, forward; -1 if the source is not one of the ``sources`` loads of this step."""
    source = output * axis.ratio + tap
    return source if 0 <= source < sources else -1


@triton.jit
def elements(
    values, ROWS: tl.constexpr, LOADS: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, PAIRS: tl.constexpr
):
    """Return COUNT elements of each of ROWS rows of LOADS loads, from the FIRST on, in fp32."""
    result = ()
    for i in tl.static_range(ROWS):
        for e in tl.static_range(COUNT):
            result += (element(values, i * LOADS, FIRST + e, PAIRS),)
    return result


@triton.jit
def multiply_row(
    sums, waiting, values, OUTPUT: tl.constexpr, AXIS_H: tl.constexpr, AXIS_W: tl.constexpr, COLS: tl.constexpr
):
    """Add to each tap's ``sums`` the products of a step's source rows with the row of dy that is OUTPUT rows ahead."""
    TAPS_W: tl.constexpr = AXIS_W.taps
    SPAN: tl.constexpr = span(AXIS_W, COLS)
    new = ()
    for tap in tl.static_range(AXIS_H.taps * AXIS_W.taps):
        total = sums[tap]
        if source_of(AXIS_H, OUTPUT, tap // TAPS_W, AXIS_H.ratio) >= 0:
            for j in tl.static_range(COLS):
                v = values[
                    source_of(AXIS_H, OUTPUT, tap // TAPS_W, AXIS_H.ratio) * SPAN + j * AXIS_W.ratio + tap % TAPS_W
                ]
                total += v * waiting[j]
        new += (total,)
    return new


@triton.jit(do_not_specialize=["fan_in"])
def conv2d_depthwise_weight_grad_kernel(
    grad,  # Image [N, K, P, Q]: ∂L/∂y
    source,  # Image [N, C, H, W]: x
    out,  # Filter: ∂L/∂w
    shared,  # SharedSums of BLOCK_C for each tap a tile, or None for one split
    sizes,  # Sizes
    rows_per_tile,
    tiles_per_split,
    fan_in,
    AXIS_H: tl.constexpr, AXIS_W: tl.constexpr,
    COLUMNS: tl.constexpr,  # output channels of an input channel
    PLANES: tl.constexpr,
    GRAD_PAIRS: tl.constexpr, SOURCE_PAIRS: tl.constexpr,
    GRAD_ALIGN: tl.constexpr, SOURCE_ALIGN: tl.constexpr,  # see walk
    COLS: tl.constexpr,  # columns of dy in a column group: they divide those of an image
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,  # column groups and channels of a program
    CHUNK: tl.constexpr,  # see last_to_arrive
    INDEX: tl.constexpr,
):  # fmt: skip
    """out[k, 0, r, s] = Σ_{n, p, q} grad[n, k, p, q] · source[n, k // COLUMNS, tap r of p, tap s of q].

    Grid: (channel tiles, splits). A split takes tiles as of the forward convolution and walks them like it: a row of
    the source meets the rows of dy whose windows see it, which wait in registers.
    """
    SHAPE: tl.constexpr = (BLOCK_C, BLOCK_Q) if PLANES else (BLOCK_Q, BLOCK_C)
    WARM_UP: tl.constexpr = AXIS_H.warm_up
    STEP: tl.constexpr = AXIS_H.ratio
    PITCH_H: tl.constexpr = AXIS_H.source_pitch
    TAPS_W: tl.constexpr = AXIS_W.taps
    TAPS: tl.constexpr = AXIS_H.taps * AXIS_W.taps
    ODD: tl.constexpr = 1 if SOURCE_PAIRS and AXIS_W.first_is_odd else 0
    SPAN: tl.constexpr = span(AXIS_W, COLS)
    LOADS: tl.constexpr = (SPAN + ODD + 1) // 2 if SOURCE_PAIRS else SPAN
    GRADS: tl.constexpr = COLS // 2 if GRAD_PAIRS else COLS

    channels = sizes.groups * COLUMNS
    k = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = k[:, None] if PLANES else k[None, :]
    c_ok = tl.max_constancy(k < channels, (1, 1) if PLANES else (1, max(SOURCE_ALIGN, GRAD_ALIGN)))
    strips = AXIS_H.out_pitch * tl.cdiv(tl.cdiv(sizes.out_h, AXIS_H.out_pitch), rows_per_tile)
    tiles = strips * tl.cdiv(sizes.batch * lanes_of_row(sizes, AXIS_W, COLS), BLOCK_Q)
    first = tl.program_id(1) * tiles_per_split

    sums = zeros(TAPS, SHAPE)
    for tile in range(first, min(first + tiles_per_split, tiles)):
        n, q, lane_ok = lane_of(tile // strips, sizes, AXIS_W, COLS, BLOCK_Q, PLANES)
        # A column group with nothing to do gets a column that no tap can bring back into the image.
        q = tl.where(lane_ok & (q < sizes.out_w), q, -(1 << 29))
        p = tiled(tile % strips, rows_per_tile, AXIS_H)
        rows = min(tl.cdiv(sizes.out_h - p, AXIS_H.out_pitch), rows_per_tile)
        row = first_source(p, AXIS_H)
        column = first_source(q, AXIS_W) - ODD
        pointers, step_h, step_w = walk(
            source,
            n,
            k // COLUMNS,
            row,
            column,
            PITCH_H,
            AXIS_W.source_pitch,
            PLANES,
            SOURCE_PAIRS,
            SOURCE_ALIGN,
            INDEX,
        )
        places, grad_step_h, grad_step_w = walk(
            grad, n, k, p, q, AXIS_H.out_pitch, AXIS_W.out_pitch, PLANES, GRAD_PAIRS, GRAD_ALIGN, INDEX
        )

        waiting = zeros(AXIS_H.waiting * COLS, SHAPE)
        ahead = load_rows(
            pointers, column, c_ok, row, sizes.source_h, sizes.source_w, step_h, step_w, step_w,
            STEP, LOADS, 1, PITCH_H, AXIS_W.source_pitch, SOURCE_PAIRS,
        )  # fmt: skip
        grad_ahead = load_rows(
            places, q, c_ok, 0, rows, sizes.out_w, grad_step_h, grad_step_w, grad_step_w,
            1, GRADS, 1, 1, AXIS_W.out_pitch, GRAD_PAIRS,
        )  # fmt: skip
        for t in range(rows + WARM_UP):
            values = elements(ahead, STEP, LOADS, ODD, SPAN, SOURCE_PAIRS)
            waiting = waiting[COLS:] + elements(grad_ahead, 1, GRADS, 0, COLS, GRAD_PAIRS)
            row += STEP * PITCH_H
            pointers += STEP * step_h
            places += grad_step_h
            ahead = load_rows(
                pointers, column, c_ok, row, sizes.source_h, sizes.source_w, step_h, step_w, step_w,
                STEP, LOADS, 1, PITCH_H, AXIS_W.source_pitch, SOURCE_PAIRS,
            )  # fmt: skip
            grad_ahead = load_rows(
                places, q, c_ok, t + 1, rows, sizes.out_w, grad_step_h, grad_step_w, grad_step_w,
                1, GRADS, 1, 1, AXIS_W.out_pitch, GRAD_PAIRS,
            )  # fmt: skip
            for a in tl.static_range(WARM_UP + 1):
                # Not zeros for the rows of dy beyond the strip: an infinite x would make NaN of them.
                if inside(t + (a - WARM_UP), rows):
                    sums = multiply_row(
                        sums, waiting[a * COLS : a * COLS + COLS], values, a - WARM_UP, AXIS_H, AXIS_W, COLS
                    )

    if shared is None:
        place = out.ptr + (k // COLUMNS * out.group + k % COLUMNS * out.column)
        for tap in tl.static_range(TAPS):
            total = over_pixels(sums[tap], PLANES).to(out.ptr.dtype.element_ty)
            tl.store(place + (tap // TAPS_W * out.r + tap % TAPS_W * out.s), total, mask=k < channels)
    else:
        SIZE: tl.constexpr = TAPS * BLOCK_C
        block, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
        for tap in tl.static_range(TAPS):
            leave_part(over_pixels(sums[tap], PLANES), shared, block, split, splits, fan_in, tap * BLOCK_C, SIZE)
        if last_to_arrive(shared, block, split, splits, fan_in, SIZE, CHUNK):
            for start in range(0, SIZE, CHUNK):
                i = start + tl.arange(0, CHUNK)
                total = total_of(shared, block, splits, fan_in, i, SIZE)
                of_tap = i // BLOCK_C
                channel = block * BLOCK_C + i % BLOCK_C
                place = channel // COLUMNS * out.group + channel % COLUMNS * out.column
                place = out.ptr + (place + of_tap // TAPS_W * out.r + of_tap % TAPS_W * out.s)
                total = total.to(out.ptr.dtype.element_ty)
                tl.store(place, total, mask=(i < SIZE) & (channel < channels))
