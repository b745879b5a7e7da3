"""Rounding of fp32 values to the dtype of an output, for the ends of kernels."""

import triton
import triton.language as tl


@triton.jit
def narrowed(y, inverse_scale, DTYPE: tl.constexpr):
    """Return ``y`` (fp32) in DTYPE: one rounding to nearest even. ``inverse_scale`` counts for 8-bit ones alone.

    int8 and float8_e4m3fn are y · inverse_scale, at most 127 or 448 in magnitude. A NaN stays one, but is 0 in int8.
    """
    if DTYPE.is_int():
        return rounded_to_int8(y * inverse_scale)
    elif DTYPE.is_fp8():
        return (y * inverse_scale).to(DTYPE)  # the conversion saturates
    else:
        return y.to(DTYPE)


@triton.jit
def rounded_to_int8(q):
    """Return fp32 ``q`` as int8."""
    q = tl.where(q == q, q, 0.0)
    q = tl.minimum(tl.maximum(q, -127.0), 127.0)
    # In [2²³, 2²⁴) fp32 holds whole numbers alone: the sum rounds to nearest even, and its last byte is the result. It
    # takes one addition, where a conversion to integers has a fraction of an addition's rate.
    return (q + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
