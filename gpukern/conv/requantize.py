"""What quantized launches do beside today's kernels: sums by the operands' dtypes, the scales, one rounding at the end.

With sums of products ``acc``, in int32 of int8 and in fp32 of anything else, an epilogue is in this order, each
operation rounded to fp32 (the kernels are compiled without fused multiply-adds):

    y = float(acc) · scale[k];  y += bias[k];  y += residual · residual_scale;  y = act(y);  q = y · (1 / output_scale)

and q is rounded once, to the nearest even number. See ``gpukern/ops/quantized_conv2d.py``.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gpukern.conv.tf32 import rounded
from gpukern.ops._activation.functions import apply_activation
from gpukern.ops._quantize.functions import activated_for, narrowed, narrowed_activation


class Requantize(NamedTuple):
    """Scales of a quantized launch. A kernel that gets None instead is an ordinary one."""

    scale: Any  # pointer to fp32 [columns of all groups], or None for 1
    residual_scale: Any  # fp32, or None for 1
    inverse_output_scale: Any  # fp32, or None for an output in floating point of 16 or 32 bits


@triton.constexpr_function
def sum_type(first, second):
    """The type of sums of products of tiles of these types."""
    return tl.int32 if first == tl.int8 and second == tl.int8 else tl.float32


@triton.jit
def add_products(a, b, acc, PRECISION: tl.constexpr):
    """Return ``acc + a · b`` of tiles [M, K] and [K, N] of any dtypes that the operators take.

    Sums of float8_e4m3fn leave the tensor cores after each step: on Hopper those add in 14 bits, see
    ``docs/convolution.md``.
    """
    if a.dtype == tl.int8 and b.dtype == tl.int8:
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    elif a.dtype.is_fp8() and b.dtype.is_fp8():
        acc = tl.dot(a, b, acc, max_num_imprecise_acc=a.shape[1])
    else:
        if a.dtype != b.dtype:
            a = a.to(b.dtype)  # exact
        acc = tl.dot(rounded(a, PRECISION), rounded(b, PRECISION), acc, input_precision=PRECISION)
    return acc


@triton.jit
def scaled(acc, requantize, channel, channel_ok, AXIS: tl.constexpr):
    """Return ``float(acc) · scale`` of a tile whose pixels are along AXIS; ``acc`` itself in an ordinary kernel."""
    if requantize is not None:
        acc = acc.to(tl.float32)
        if requantize.scale is not None:
            acc = acc * tl.expand_dims(tl.load(requantize.scale + channel, mask=channel_ok, other=0.0), AXIS)
    return acc


@triton.jit
def scaled_residual(residual, requantize):
    """Return a tile of the residual in fp32, times its scale."""
    residual = residual.to(tl.float32)
    if requantize is not None:  # noqa: SIM102 - the attribute of None is looked up otherwise
        if requantize.residual_scale is not None:
            residual = residual * requantize.residual_scale
    return residual


@triton.jit
def as_stored(y, requantize, TYPE: tl.constexpr, ACTIVATION: tl.constexpr = "none"):
    """Return the fp32 tile ``y`` as stored in an output of TYPE; ACTIVATION is that of ``before_storing``, if any."""
    if requantize is not None:  # noqa: SIM102 - as above
        if requantize.inverse_output_scale is not None:
            return narrowed(y, requantize.inverse_output_scale, TYPE, ACTIVATION)
    return y.to(TYPE)


@triton.jit
def before_storing(y, requantize, ACTIVATION: tl.constexpr, negative_slope, TYPE: tl.constexpr):
    """Return act(y), or what :func:`as_stored` makes act(y) of, fp32; the maxima of pixels may be taken in between."""
    if requantize is not None:
        y = activated_for(y, ACTIVATION, negative_slope, TYPE)
    else:
        y = apply_activation(y, ACTIVATION, negative_slope)
    return y


@triton.jit
def activated(y, requantize, ACTIVATION: tl.constexpr, negative_slope, TYPE: tl.constexpr):
    """Return act(y) as it is stored in an output of TYPE: for kernels that do nothing in between."""
    if requantize is not None:  # noqa: SIM102 - as above
        if requantize.inverse_output_scale is not None:
            return narrowed_activation(y, requantize.inverse_output_scale, ACTIVATION, negative_slope, TYPE)
    return apply_activation(y, ACTIVATION, negative_slope).to(TYPE)
