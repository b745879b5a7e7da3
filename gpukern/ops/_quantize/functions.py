"""Rounding of fp32 values to the dtype of an output, for the ends of kernels."""

import triton
import triton.language as tl

from gpukern.ops._activation.functions import apply_activation

# 1.5 · 2²³: in its binade fp32 has whole numbers alone.
_WHOLE = tl.constexpr(12582912.0)


@triton.jit
def narrowed(y, inverse_scale, DTYPE: tl.constexpr):
    """Return ``y`` (fp32) in DTYPE: one rounding to nearest even. ``inverse_scale`` counts for 8-bit ones alone.

    int8 and float8_e4m3fn are y · inverse_scale, at most 127 or 448 in magnitude. A NaN stays one, but is 0 in int8.
    """
    if DTYPE.is_int():
        q = y * inverse_scale
        q = tl.where(q == q, q, 0.0)
        return nearest_int8(tl.minimum(tl.maximum(q, -127.0), 127.0))
    elif DTYPE.is_fp8():
        return (y * inverse_scale).to(DTYPE)  # the conversion saturates
    else:
        return y.to(DTYPE)


@triton.jit
def narrowed_activation(y, inverse_scale, NAME: tl.constexpr, negative_slope, DTYPE: tl.constexpr):
    """Return ``narrowed(act(y))``, in fewer instructions where that is int8 and never negative."""
    if DTYPE.is_int() and (NAME == "relu" or NAME == "relu6"):
        # A NaN becomes 0 either way: a maximum may drop it, and nothing is left to be clamped from below.
        y = tl.maximum(y, 0.0)
        if NAME == "relu6":
            y = tl.minimum(y, 6.0)
        return nearest_int8(tl.minimum(y * inverse_scale, 127.0))
    else:
        return narrowed(apply_activation(y, NAME, negative_slope), inverse_scale, DTYPE)


@triton.jit
def nearest_int8(q):
    """Return fp32 ``q`` between −127 and 127 as int8, rounded to nearest even.

    The sum rounds, and its last byte is the result: one addition, where a conversion has a fraction of its rate.
    """
    return (q + _WHOLE).to(tl.int32, bitcast=True).to(tl.int8)
