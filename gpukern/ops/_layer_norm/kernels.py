"""Kernels of layer and RMS norm, the latter without CENTERED. See :mod:`gpukern.ops.layer_norm` for the mathematics.

Where a row fits a program's registers, it is read once; the kernels for this have ``row`` in their names. Longer rows
are shared by programs, and take a launch for each sum that the next one needs.

All arithmetic is fp32, every sum has a fixed order, and there are no atomics: the same bits in every run.
"""

import triton
import triton.language as tl

from gpukern.ops._activation.functions import activation_backward, apply_activation
from gpukern.ops._batch_norm.functions import channel_tile, pixel_tile
from gpukern.ops._layer_norm.functions import inverse_deviation, load_parameter, load_tile, moments, store_tile
from gpukern.ops._reduction.functions import finish_sums, merge_statistics, merge_sums, store_part
from gpukern.ops._reduction.shared_sums import last_to_arrive, leave_part, total_of

# ---- what both share -----------------------------------------------------------------------------------------------


@triton.jit
def _write(
    y, residual, normal, weight, bias, n, h, p, c, mask, negative_slope,
    ACTIVATION: tl.constexpr, ROW_ALIGN: tl.constexpr, COLUMN_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    z = normal * weight + bias
    if residual.ptr is not None:
        z += load_tile(residual, n, h, p, c, mask, ROW_ALIGN, COLUMN_ALIGN, INDEX)
    value = apply_activation(z, ACTIVATION, negative_slope)
    store_tile(y, value, n, h, p, c, mask, ROW_ALIGN, COLUMN_ALIGN, INDEX)


@triton.jit
def _inner_gradient(
    grad, other, normal, weight, bias, n, h, p, c, mask, negative_slope,
    ACTIVATION: tl.constexpr, NEEDS_INPUT: tl.constexpr,
    ROW_ALIGN: tl.constexpr, COLUMN_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """∂L/∂z where y = act(z), z = x̂ · weight + bias + residual; zero outside of ``mask``."""
    g = load_tile(grad, n, h, p, c, mask, ROW_ALIGN, COLUMN_ALIGN, INDEX)
    if ACTIVATION != "none":
        # From x, which is loaded anyway; y is read only if it includes a residual.
        saved = normal * weight + bias
        if other.ptr is not None:
            kept = load_tile(other, n, h, p, c, mask, ROW_ALIGN, COLUMN_ALIGN, INDEX)
            saved = saved + kept if NEEDS_INPUT else kept
        elif not NEEDS_INPUT:
            saved = apply_activation(saved, ACTIVATION, negative_slope)
        g = activation_backward(g, saved, ACTIVATION, negative_slope)
    return tl.where(mask, g, 0.0)


# ---- rows that fit -------------------------------------------------------------------------------------------------


@triton.jit
def layer_norm_row_kernel(
    x, residual, y,  # Operands; y contiguous
    weight_ptr, bias_ptr,  # [columns] or None
    sizes, steps, steps_per_program, eps, negative_slope,
    CENTERED: tl.constexpr, ACTIVATION: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    ROW_ALIGN: tl.constexpr, COLUMN_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """y = act(x̂ · weight + bias + residual). Grid: programs, each with some tiles of whole rows."""
    c, valid = channel_tile(0, sizes, BLOCK_C, COLUMN_ALIGN)
    weight = load_parameter(weight_ptr, c, valid, 1.0)
    bias = load_parameter(bias_ptr, c, valid, 0.0)
    count = tl.cast(sizes.channel_groups, tl.float32) * COLUMN_ALIGN
    first = tl.program_id(0) * steps_per_program
    for step in tl.range(first, tl.minimum(first + steps_per_program, steps), num_stages=STAGES):
        n, h, p, inside = pixel_tile(step, sizes, BLOCK_R, ROW_ALIGN, INDEX)
        mask = inside & valid
        value = load_tile(x, n, h, p, c, mask, ROW_ALIGN, COLUMN_ALIGN, INDEX)
        _, apart, squares = moments(value, mask, count, CENTERED)
        normal = apart * inverse_deviation(squares / count, eps)
        _write(
            y, residual, normal, weight, bias, n, h, p, c, mask, negative_slope,
            ACTIVATION, ROW_ALIGN, COLUMN_ALIGN, INDEX,
        )  # fmt: skip


@triton.jit
def layer_norm_row_backward_kernel(
    grad,  # Operand: ∂L/∂y
    x,  # Operand
    other,  # Operand: the residual where the activation's derivative needs its input, else y; or nothing
    inner,  # Operand: ∂L/∂z is written there; or nothing
    out,  # Operand: ∂L/∂x is written there; or nothing
    weight_ptr, bias_ptr,
    grad_weight_ptr, grad_bias_ptr,  # [columns] or None
    shared,  # SharedSums of one tile: the weight's sums, then the bias's; None for one program, or no sums
    fan_in, sizes, steps, steps_per_program, eps, negative_slope,
    CENTERED: tl.constexpr, ACTIVATION: tl.constexpr, NEEDS_INPUT: tl.constexpr, STAGES: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    ROW_ALIGN: tl.constexpr, COLUMN_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Everything in one pass: a row's statistics are made again. Grid: programs, each with some tiles of whole rows."""
    c, valid = channel_tile(0, sizes, BLOCK_C, COLUMN_ALIGN)
    weight = load_parameter(weight_ptr, c, valid, 1.0)
    bias = load_parameter(bias_ptr, c, valid, 0.0)
    count = tl.cast(sizes.channel_groups, tl.float32) * COLUMN_ALIGN
    sum_gx = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    sum_g = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    first = tl.program_id(0) * steps_per_program
    for step in tl.range(first, tl.minimum(first + steps_per_program, steps), num_stages=STAGES):
        n, h, p, inside = pixel_tile(step, sizes, BLOCK_R, ROW_ALIGN, INDEX)
        mask = inside & valid
        value = load_tile(x, n, h, p, c, mask, ROW_ALIGN, COLUMN_ALIGN, INDEX)
        _, apart, squares = moments(value, mask, count, CENTERED)
        inverse = inverse_deviation(squares / count, eps)
        # Rows beyond the last have no deviation: without eps, 0 times infinity.
        normal = tl.where(mask, apart * inverse, 0.0)
        g = _inner_gradient(
            grad, other, normal, weight, bias, n, h, p, c, mask, negative_slope,
            ACTIVATION, NEEDS_INPUT, ROW_ALIGN, COLUMN_ALIGN, INDEX,
        )  # fmt: skip
        if inner.ptr is not None:
            store_tile(inner, g, n, h, p, c, mask, ROW_ALIGN, COLUMN_ALIGN, INDEX)
        if grad_weight_ptr is not None:
            sum_gx += g * normal
        if grad_bias_ptr is not None:
            sum_g += g
        if out.ptr is not None:
            g *= weight
            slope = g - normal * (tl.sum(g * normal, 1)[:, None] / count)
            if CENTERED:
                slope -= tl.sum(g, 1)[:, None] / count
            store_tile(out, slope * inverse, n, h, p, c, mask, ROW_ALIGN, COLUMN_ALIGN, INDEX)

    if grad_weight_ptr is not None:
        if grad_bias_ptr is not None:
            _finish(
                (sum_gx, sum_g), (grad_weight_ptr, grad_bias_ptr), shared, fan_in, c, valid,
                sizes, CHUNK, BLOCK_C, COLUMN_ALIGN,
            )  # fmt: skip
        else:
            _finish(
                (sum_gx,), (grad_weight_ptr,), shared, fan_in, c, valid, sizes, CHUNK, BLOCK_C, COLUMN_ALIGN
            )  # fmt: skip
    elif grad_bias_ptr is not None:
        _finish((sum_g,), (grad_bias_ptr,), shared, fan_in, c, valid, sizes, CHUNK, BLOCK_C, COLUMN_ALIGN)


@triton.jit
def _finish(
    sums, outs, shared, fan_in, c, valid, sizes, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, COLUMN_ALIGN: tl.constexpr
):
    """Add each of ``sums`` over its rows and over all programs, and store it."""
    if shared is None:
        for i in tl.static_range(len(sums)):
            total = tl.sum(sums[i], 0)[None, :]
            tl.store(outs[i] + c, total.to(outs[i].dtype.element_ty), mask=valid)
    else:
        SIZE: tl.constexpr = len(sums) * BLOCK_C
        program, programs = tl.program_id(0), tl.num_programs(0)
        for i in tl.static_range(len(sums)):
            leave_part(tl.sum(sums[i], 0)[None, :], shared, 0, program, programs, fan_in, i * BLOCK_C, SIZE)
        if last_to_arrive(shared, 0, program, programs, fan_in, SIZE, CHUNK):
            for i in tl.static_range(len(sums)):
                for start in range(0, BLOCK_C, CHUNK):
                    column = start + tl.arange(0, CHUNK)
                    total = total_of(shared, 0, programs, fan_in, i * BLOCK_C + column, SIZE)
                    exists = column < sizes.channel_groups * COLUMN_ALIGN
                    tl.store(outs[i] + column, total.to(outs[i].dtype.element_ty), mask=exists)


# ---- long rows -----------------------------------------------------------------------------------------------------


@triton.jit
def _row_number(n, h, p, sizes, ROW_ALIGN: tl.constexpr):
    return (n * sizes.height + h) * (sizes.inner_groups * ROW_ALIGN) + p


@triton.jit
def _load_first(
    x, n, h, p, inside,
    CENTERED: tl.constexpr, ROW_ALIGN: tl.constexpr, COLUMN_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The first value of each row: a long row's mean is stored as its distance from it, which keeps its digits."""
    if CENTERED:
        return load_tile(x, n, h, p, tl.zeros((1, 1), tl.int32), inside, ROW_ALIGN, COLUMN_ALIGN, INDEX)
    else:
        return tl.zeros(inside.shape, tl.float32)


@triton.jit
def _load_numbers(statistics, row, inside, eps):
    """(mean from the first value, 1 / deviation) of the rows."""
    mean = tl.load(statistics.mean + row, mask=inside, other=0.0)
    return mean, inverse_deviation(tl.load(statistics.variance + row, mask=inside, other=1.0), eps)


@triton.jit
def layer_norm_statistics_kernel(
    x,  # Operand
    statistics,  # Statistics of rows, as others have them of channels
    sizes, rows, splits, chunks_per_split,
    CENTERED: tl.constexpr, WHOLE: tl.constexpr, BLOCK_C: tl.constexpr,
    ROW_ALIGN: tl.constexpr, COLUMN_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Mean, from the row's first value, and variance of each row, about 0 if not CENTERED. Grid: rows · splits.

    Chunks, as the splits, are merged by Chan, Golub and LeVeque's formula.
    """
    row = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    n, h, p, inside = pixel_tile(row, sizes, 1, ROW_ALIGN, INDEX)
    origin = _load_first(x, n, h, p, inside, CENTERED, ROW_ALIGN, COLUMN_ALIGN, INDEX)
    mean = tl.zeros((1, 1), tl.float32)
    deviations = tl.zeros((1, 1), tl.float32)
    count = tl.zeros((1, 1), tl.float32)
    columns = sizes.channel_groups * COLUMN_ALIGN
    for chunk in range(split * chunks_per_split, (split + 1) * chunks_per_split):
        c, valid = channel_tile(chunk, sizes, BLOCK_C, COLUMN_ALIGN)
        mask = inside & valid
        value = load_tile(x, n, h, p, c, mask, ROW_ALIGN, COLUMN_ALIGN, INDEX) - origin
        # No column is there where the last split has fewer chunks.
        here = tl.minimum(tl.maximum(columns - chunk * BLOCK_C, 0), BLOCK_C).to(tl.float32)
        value = tl.where(mask, value, 0.0)
        mean_here, _, squares = moments(value, mask, tl.maximum(here, 1.0), CENTERED)
        share = here / tl.maximum(count + here, 1.0)
        apart = mean_here - mean
        deviations += squares + apart * apart * (count * share)
        mean += apart * share
        count += here
    if WHOLE:
        tl.store(statistics.mean + row + tl.zeros((1, 1), tl.int32), mean)
        tl.store(statistics.variance + row + tl.zeros((1, 1), tl.int32), deviations / count)
    else:
        column = row + tl.zeros((1, 1), tl.int32)
        store_part(statistics.parts, (mean * count, deviations, count), split, splits, column, inside, rows)
        merge_statistics(statistics, split, splits, row, row, row + 1, rows, 1)


@triton.jit
def layer_norm_kernel(
    x, residual, y,  # Operands
    statistics, weight_ptr, bias_ptr, sizes, eps, negative_slope,
    CENTERED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    ROW_ALIGN: tl.constexpr, COLUMN_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """y = act(x̂ · weight + bias + residual) of a tile. Grid: steps · column tiles."""
    c, valid = channel_tile(tl.program_id(0) % sizes.channel_tiles, sizes, BLOCK_C, COLUMN_ALIGN)
    n, h, p, inside = pixel_tile(tl.program_id(0) // sizes.channel_tiles, sizes, BLOCK_R, ROW_ALIGN, INDEX)
    mask = inside & valid
    mean, inverse = _load_numbers(statistics, _row_number(n, h, p, sizes, ROW_ALIGN), inside, eps)
    origin = _load_first(x, n, h, p, inside, CENTERED, ROW_ALIGN, COLUMN_ALIGN, INDEX)
    value = load_tile(x, n, h, p, c, mask, ROW_ALIGN, COLUMN_ALIGN, INDEX)
    _write(
        y, residual, (value - origin - mean) * inverse,
        load_parameter(weight_ptr, c, valid, 1.0), load_parameter(bias_ptr, c, valid, 0.0),
        n, h, p, c, mask, negative_slope, ACTIVATION, ROW_ALIGN, COLUMN_ALIGN, INDEX,
    )  # fmt: skip


@triton.jit
def layer_norm_row_sums_kernel(
    grad, x, other,  # Operands
    statistics, weight_ptr, bias_ptr,
    sums,  # Sums of each row: weight · ∂L/∂z and that times x̂
    sizes, rows, splits, chunks_per_split, eps, negative_slope,
    CENTERED: tl.constexpr, WHOLE: tl.constexpr, ACTIVATION: tl.constexpr, NEEDS_INPUT: tl.constexpr,
    BLOCK_C: tl.constexpr, ROW_ALIGN: tl.constexpr, COLUMN_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The sums over a row that ∂L/∂x needs. Grid: rows · splits."""
    row = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    n, h, p, inside = pixel_tile(row, sizes, 1, ROW_ALIGN, INDEX)
    column = row + tl.zeros((1, 1), tl.int32)
    mean, inverse = _load_numbers(statistics, column, inside, eps)
    origin = _load_first(x, n, h, p, inside, CENTERED, ROW_ALIGN, COLUMN_ALIGN, INDEX)
    sum_g = tl.zeros((1, BLOCK_C), tl.float32)
    sum_gx = tl.zeros((1, BLOCK_C), tl.float32)
    for chunk in range(split * chunks_per_split, (split + 1) * chunks_per_split):
        c, valid = channel_tile(chunk, sizes, BLOCK_C, COLUMN_ALIGN)
        mask = inside & valid
        value = load_tile(x, n, h, p, c, mask, ROW_ALIGN, COLUMN_ALIGN, INDEX)
        normal = tl.where(mask, (value - origin - mean) * inverse, 0.0)
        weight = load_parameter(weight_ptr, c, valid, 1.0)
        g = weight * _inner_gradient(
            grad, other, normal, weight, load_parameter(bias_ptr, c, valid, 0.0), n, h, p, c, mask, negative_slope,
            ACTIVATION, NEEDS_INPUT, ROW_ALIGN, COLUMN_ALIGN, INDEX,
        )  # fmt: skip
        sum_g += g
        sum_gx += g * normal
    total_g = tl.sum(sum_g, 1)[:, None]
    total_gx = tl.sum(sum_gx, 1)[:, None]
    if WHOLE:
        tl.store(sums.totals + column, total_g)
        tl.store(sums.totals + rows + column, total_gx)
    else:
        store_part(sums.parts, (total_g, total_gx), split, splits, column, inside, rows)
        merge_sums(sums, split, splits, row, row, row + 1, rows, 2, 1)


@triton.jit
def layer_norm_backward_kernel(
    grad, x, other, inner, out,  # Operands, as of the kernel of whole rows
    statistics, weight_ptr, bias_ptr,
    totals_ptr,  # fp32 [2, rows]: the sums of the kernel above; None without ``out``
    sums,  # Sums of each column; a split is a row of tiles. None if none are wanted
    sizes, rows, steps, steps_per_split, splits, eps, negative_slope,
    CENTERED: tl.constexpr, WHOLE: tl.constexpr, ACTIVATION: tl.constexpr, NEEDS_INPUT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    ROW_ALIGN: tl.constexpr, COLUMN_ALIGN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """∂L/∂x, ∂L/∂z and the parameters' gradients of a tile of columns. Grid: splits · column tiles."""
    tile = tl.program_id(0) % sizes.channel_tiles
    split = tl.program_id(0) // sizes.channel_tiles
    c, valid = channel_tile(tile, sizes, BLOCK_C, COLUMN_ALIGN)
    weight = load_parameter(weight_ptr, c, valid, 1.0)
    bias = load_parameter(bias_ptr, c, valid, 0.0)
    columns = sizes.channel_groups * COLUMN_ALIGN
    count = tl.cast(columns, tl.float32)
    sum_g = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    sum_gx = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    first = split * steps_per_split
    for step in range(first, tl.minimum(first + steps_per_split, steps)):
        n, h, p, inside = pixel_tile(step, sizes, BLOCK_R, ROW_ALIGN, INDEX)
        mask = inside & valid
        row = _row_number(n, h, p, sizes, ROW_ALIGN)
        mean, inverse = _load_numbers(statistics, row, inside, eps)
        origin = _load_first(x, n, h, p, inside, CENTERED, ROW_ALIGN, COLUMN_ALIGN, INDEX)
        value = load_tile(x, n, h, p, c, mask, ROW_ALIGN, COLUMN_ALIGN, INDEX)
        normal = tl.where(mask, (value - origin - mean) * inverse, 0.0)
        g = _inner_gradient(
            grad, other, normal, weight, bias, n, h, p, c, mask, negative_slope,
            ACTIVATION, NEEDS_INPUT, ROW_ALIGN, COLUMN_ALIGN, INDEX,
        )  # fmt: skip
        if inner.ptr is not None:
            store_tile(inner, g, n, h, p, c, mask, ROW_ALIGN, COLUMN_ALIGN, INDEX)
        sum_g += g
        sum_gx += g * normal
        if out.ptr is not None:
            slope = g * weight - normal * (tl.load(totals_ptr + rows + row, mask=inside, other=0.0) / count)
            if CENTERED:
                slope -= tl.load(totals_ptr + row, mask=inside, other=0.0) / count
            store_tile(out, slope * inverse, n, h, p, c, mask, ROW_ALIGN, COLUMN_ALIGN, INDEX)

    if sums is not None:
        totals = tl.sum(sum_g, 0)[None, :], tl.sum(sum_gx, 0)[None, :]
        if WHOLE:
            finish_sums(sums, totals, c, valid, columns)
        else:
            store_part(sums.parts, totals, split, splits, c, valid, columns)
            merge_sums(sums, split, splits, tile, tile * BLOCK_C, columns, columns, 2, BLOCK_C)
