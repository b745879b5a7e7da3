"""Functions shared by the kernels of layer and RMS norm: operands, addresses, and a row's statistics.

Tiles are [BLOCK_R, BLOCK_C], values per row [BLOCK_R, 1] and per column [1, BLOCK_C].
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Operand(NamedTuple):
    """A tensor: a pointer, None for no tensor, and strides, see :class:`~.problem.Walk`.

    Strides along runs are in elements; those across, in units of the alignment of runs.
    """

    ptr: Any
    n: Any
    h: Any
    p: Any
    c: Any
    rows_run: Any  # 1 or None, which Triton compiles in


@triton.jit
def _at(t, n, h, p, c, ROW_ALIGN: tl.constexpr, COLUMN_ALIGN: tl.constexpr, INDEX: tl.constexpr):
    # A product shows the compiler what divides the place where a run starts.
    if t.rows_run is not None:
        return t.ptr + ((n * t.n + h * t.h + c.to(INDEX) * t.c) * ROW_ALIGN + p)
    else:
        return t.ptr + ((n * t.n + h * t.h + p * t.p) * COLUMN_ALIGN + c.to(INDEX) * t.c)


@triton.jit
def load_tile(t, n, h, p, c, mask, ROW_ALIGN: tl.constexpr, COLUMN_ALIGN: tl.constexpr, INDEX: tl.constexpr):
    place = _at(t, n, h, p, c, ROW_ALIGN, COLUMN_ALIGN, INDEX)
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(t, value, n, h, p, c, mask, ROW_ALIGN: tl.constexpr, COLUMN_ALIGN: tl.constexpr, INDEX: tl.constexpr):
    place = _at(t, n, h, p, c, ROW_ALIGN, COLUMN_ALIGN, INDEX)
    tl.store(place, value.to(t.ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_parameter(ptr, c, valid, other: tl.constexpr):
    """Weight or bias of the columns, fp32 [1, BLOCK_C]; without one, ``other``."""
    value = tl.full(c.shape, other, tl.float32)
    if ptr is not None:
        value = tl.load(ptr + c, mask=valid, other=other).to(tl.float32)
    return value


@triton.jit
def moments(x, mask, count, CENTERED: tl.constexpr):
    """(mean, x − mean, Σ(x − mean)²) of each row, over ``count`` columns in ``mask``; without centring, of 0.

    By the corrected two-pass algorithm (Chan, Golub and LeVeque, "Algorithms for computing the sample variance",
    1983): the differences' own mean is what the rounded mean lacks, so the result does not depend on the mean's size.
    """
    if CENTERED:
        mean = tl.sum(x, 1)[:, None] / count
        apart = tl.where(mask, x - mean, 0.0)
        rest = tl.sum(apart, 1)[:, None] / count
        apart -= rest
        squares = tl.sum(tl.where(mask, apart * apart, 0.0), 1)[:, None]
        mean += rest
    else:
        mean = tl.zeros((x.shape[0], 1), tl.float32)
        apart = x
        squares = tl.sum(tl.where(mask, x * x, 0.0), 1)[:, None]
    return mean, apart, squares


@triton.jit
def inverse_deviation(variance, eps):
    # Correctly rounded: Triton's rsqrt is not.
    return tl.div_rn(tl.full(variance.shape, 1.0, tl.float32), tl.sqrt_rn(variance + eps))
