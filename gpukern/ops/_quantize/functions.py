"""Rounding of fp32 values to the dtype of an output, for the ends of kernels."""

import triton
import triton.language as tl

from gpukern.ops._activation.functions import apply_activation

# 1.5 · 2²³: in its binade fp32 has whole numbers alone.
_WHOLE = tl.constexpr(12582912.0)
# More than the bits of any number near that, with zeros in the lowest byte.
_BEYOND = tl.constexpr(0x4B400100)


@triton.constexpr_function
def _least(name):
    """The least that follows an activation in int8; its clamp is all there is of relu."""
    return 0.0 if name in ("relu", "relu6", "sigmoid", "hardsigmoid") else -127.0


@triton.jit
def narrowed(y, inverse_scale, DTYPE: tl.constexpr, ACTIVATION: tl.constexpr = "none"):
    """Return ``y`` (fp32) in DTYPE: one rounding to nearest even. ``inverse_scale`` counts for 8-bit ones alone.

    int8 and float8_e4m3fn are y · inverse_scale, at most 127 or 448 in magnitude. A NaN stays one, but is 0 in int8.
    ACTIVATION is that of ``activated_for``, if any.
    """
    if DTYPE.is_int():
        return nearest_int8(y * inverse_scale, _least(ACTIVATION))
    elif DTYPE.is_fp8():
        return (y * inverse_scale).to(DTYPE)  # the conversion saturates
    else:
        return y.to(DTYPE)


@triton.jit
def narrowed_activation(y, inverse_scale, NAME: tl.constexpr, negative_slope, DTYPE: tl.constexpr):
    """Return ``act(y)`` in DTYPE, as :func:`narrowed`."""
    return narrowed(activated_for(y, NAME, negative_slope, DTYPE), inverse_scale, DTYPE, NAME)


@triton.jit
def activated_for(y, NAME: tl.constexpr, negative_slope, DTYPE: tl.constexpr):
    """Return act(y), fp32, in fewer instructions; the zeros of relu before int8 are left to the clamp of ``narrowed``.

    Maxima of pixels between the two are the same: relu never falls, nor does the product with a scale.
    """
    if NAME == "relu" or NAME == "relu6":
        # A maximum or minimum is one instruction, a select two.
        if not DTYPE.is_int():
            y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if NAME == "relu6":
            y = tl.minimum(y, 6.0, propagate_nan=tl.PropagateNan.ALL)
        return y
    else:
        return apply_activation(y, NAME, negative_slope)


@triton.jit
def nearest_int8(q, LEAST: tl.constexpr = -127.0):
    """Return fp32 ``q`` as int8 between LEAST and 127, rounded to nearest even; a NaN is 0.

    The sum rounds, and its last byte is the result: one addition, where a conversion has a fraction of its rate.
    """
    if LEAST == 0.0:
        # Of a NaN and a number a GPU takes the number. (NumPy does not, but the last byte of its NaN is 0.)
        return (tl.minimum(tl.maximum(q, 0.0), 127.0) + _WHOLE).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        q = tl.maximum(q, LEAST, propagate_nan=tl.PropagateNan.ALL)
        q = tl.minimum(q, 127.0, propagate_nan=tl.PropagateNan.ALL)
        # As whole numbers, the bits of a NaN are the largest.
        return tl.minimum((q + _WHOLE).to(tl.int32, bitcast=True), _BEYOND).to(tl.int8)
