"""A matrix product of strided matrices: each index is a number of up to four digits, each digit with its own stride."""

from typing import NamedTuple

import triton
import triton.language as tl

from gpukern.conv.indexing import tile_order
from gpukern.conv.tf32 import rounded
from gpukern.ops._activation.functions import apply_activation
from gpukern.ops._reduction.shared_sums import last_to_arrive, leave_part, total_of


class Digits(NamedTuple):
    """An index below ``size``: how many values its last three digits have."""

    size: object
    second: object
    third: object
    fourth: object


class Steps(NamedTuple):
    """Strides of a tensor along the digits of an index, in elements."""

    first: object
    second: object
    third: object
    fourth: object


class Matrix(NamedTuple):
    """A tensor and its strides along the digits of both of its indices."""

    ptr: object
    rows: object
    columns: object


@triton.jit
def strided_product_kernel(
    a,  # Matrix [M, K]
    b,  # Matrix [K, N]
    out,  # Matrix [M, N]
    bias_ptr,  # or None; ``bias_steps`` are its strides along N
    bias_steps,
    residual_ptr,  # laid out like out, or None
    shared,  # SharedSums of BLOCK_M · BLOCK_N a tile, or None for one split
    m,  # Digits
    n,
    k,
    share,  # of K for each split, a multiple of BLOCK_K
    fan_in,
    negative_slope,
    A_ALIGN_M: tl.constexpr,  # what the start of every run along an index is a multiple of, in elements; 1 where the
    A_ALIGN_K: tl.constexpr,  # elements along it are not adjacent
    B_ALIGN_K: tl.constexpr,
    B_ALIGN_N: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    CHUNK: tl.constexpr,  # see last_to_arrive
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    MOVABLE: tl.constexpr,  # see rounded
    INDEX: tl.constexpr,
):
    """out = act(a · b + bias + residual). Grid: (tiles, 1, splits)."""
    pid_m, pid_n = tile_order(tl.program_id(0), tl.cdiv(m.size, BLOCK_M), tl.cdiv(n.size, BLOCK_N), GROUP_M)
    row = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    column = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row_ok = tl.max_constancy(row < m.size, A_ALIGN_M)
    column_ok = tl.max_constancy(column < n.size, B_ALIGN_N)
    a_row = a.ptr + _hinted(_offsets(row, m, a.rows, INDEX), A_ALIGN_M, A_ALIGN_K)
    b_column = b.ptr + _hinted(_offsets(column, n, b.columns, INDEX), B_ALIGN_N, B_ALIGN_K)

    first = tl.program_id(2) * share
    last = min(first + share, k.size)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        a_ok = tl.max_constancy(inner < last, A_ALIGN_K)
        b_ok = tl.max_constancy(inner < last, B_ALIGN_K)
        a_place = _hinted(_offsets(inner, k, a.columns, INDEX), A_ALIGN_K, A_ALIGN_M)
        b_place = _hinted(_offsets(inner, k, b.rows, INDEX), B_ALIGN_K, B_ALIGN_N)
        left = tl.load(a_row[:, None] + a_place[None, :], mask=row_ok[:, None] & a_ok[None, :], other=0.0)
        right = tl.load(b_column[None, :] + b_place[:, None], mask=b_ok[:, None] & column_ok[None, :], other=0.0)
        left = rounded(left, PRECISION, MOVABLE)
        right = rounded(right, PRECISION, MOVABLE)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)

    if shared is None:
        if bias_ptr is not None:
            number = tl.load(bias_ptr + _offsets(column, n, bias_steps, INDEX), mask=column_ok, other=0.0)
            acc += number.to(tl.float32)[None, :]
        out_row = _hinted(_offsets(row, m, out.rows, INDEX), 1, OUT_ALIGN)
        out_column = _hinted(_offsets(column, n, out.columns, INDEX), OUT_ALIGN, 1)
        written = out_row[:, None] + out_column[None, :]
        out_ok = (row < m.size)[:, None] & tl.max_constancy(column < n.size, OUT_ALIGN)[None, :]
        if residual_ptr is not None:
            acc += tl.load(residual_ptr + written, mask=out_ok, other=0.0).to(tl.float32)
        y = apply_activation(acc, ACTIVATION, negative_slope)
        tl.store(out.ptr + written, y.to(out.ptr.dtype.element_ty), mask=out_ok)
    else:
        SIZE: tl.constexpr = BLOCK_M * BLOCK_N
        tile, split, splits = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
        leave_part(acc, shared, tile, split, splits, fan_in, 0, SIZE)
        if last_to_arrive(shared, tile, split, splits, fan_in, SIZE, CHUNK):
            for start in range(0, SIZE, CHUNK):
                at = start + tl.arange(0, CHUNK)
                total = total_of(shared, tile, splits, fan_in, at, SIZE)
                i = pid_m * BLOCK_M + at // BLOCK_N
                j = pid_n * BLOCK_N + at % BLOCK_N
                place = out.ptr + _offsets(i, m, out.rows, INDEX) + _offsets(j, n, out.columns, INDEX)
                tl.store(place, total.to(out.ptr.dtype.element_ty), mask=(i < m.size) & (j < n.size))


@triton.jit
def _offsets(i, digits, steps, INDEX: tl.constexpr):
    """Return the offsets of indices ``i`` along one side of a matrix."""
    fourth = i % digits.fourth
    i = i // digits.fourth
    third = i % digits.third
    i = i // digits.third
    offset = (i // digits.second).to(INDEX) * steps.first + (i % digits.second).to(INDEX) * steps.second
    return offset + third.to(INDEX) * steps.third + fourth.to(INDEX) * steps.fourth


@triton.jit
def _hinted(offset, RUN: tl.constexpr, ALIGN: tl.constexpr):
    """Promise that ``offset`` comes in aligned runs of RUN adjacent elements, or else in multiples of ALIGN."""
    if RUN > 1:
        offset = tl.max_contiguous(offset, RUN)
    # Of runs the promise is about their starts.
    return tl.multiple_of(offset, RUN if RUN > 1 else ALIGN)
