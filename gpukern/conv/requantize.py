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

    Sums of float8_e4m3fn leave the tensor cores after each step: on Ada and Hopper those add in 14 bits, see
    ``docs/convolution.md``. For mma.sync (PRECISION is "apart") that is an addition of its own, which Triton does not
    join to the product because of the limit.
    """
    if a.dtype == tl.int8 and b.dtype == tl.int8:
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    elif a.dtype.is_fp8() and b.dtype.is_fp8():
        if PRECISION == "apart":
            acc += tl.dot(a, b, max_num_imprecise_acc=a.shape[1])
        else:
            acc = tl.dot(a, b, acc, max_num_imprecise_acc=a.shape[1])
    else:
        if a.dtype != b.dtype:
            a = widened(a, b.dtype)
        acc = tl.dot(rounded(a, PRECISION), rounded(b, PRECISION), acc, input_precision=PRECISION)
    return acc


@triton.jit
def widened(x, TYPE: tl.constexpr):
    """Return a tile in 8 bits in TYPE, of 16: exact.

    Triton's own conversion of whole numbers takes one at a time, at a quarter of the rate of other instructions; here
    bytes x + 128 become the low digits of 2¹⁰ or 2²³, four at a time, from which 2¹⁰ + 128 or 2²³ + 128 is taken.
    """
    if x.dtype == tl.int8 and tl.float16 == TYPE:
        x = tl.inline_asm_elementwise(
            """
            {   // int8 to float16
            .reg .b32 u, c;
            xor.b32 u, $2, 0x80808080;
            mov.b32 c, 0x64806480;
            prmt.b32 $0, u, 0x64646464, 0x4140;
            prmt.b32 $1, u, 0x64646464, 0x4342;
            sub.rn.f16x2 $0, $0, c;
            sub.rn.f16x2 $1, $1, c;
            }
            """,
            "=&r,=&r,r", [x], dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    elif x.dtype == tl.int8 and tl.bfloat16 == TYPE:
        x = tl.inline_asm_elementwise(
            """
            {   // int8 to bfloat16
            .reg .b32 u, f<4>;
            xor.b32 u, $2, 0x80808080;
            prmt.b32 f0, u, 0x4B000000, 0x7540;
            prmt.b32 f1, u, 0x4B000000, 0x7541;
            prmt.b32 f2, u, 0x4B000000, 0x7542;
            prmt.b32 f3, u, 0x4B000000, 0x7543;
            sub.rn.f32 f0, f0, 0f4B000080;
            sub.rn.f32 f1, f1, 0f4B000080;
            sub.rn.f32 f2, f2, 0f4B000080;
            sub.rn.f32 f3, f3, 0f4B000080;
            cvt.rn.bf16x2.f32 $0, f1, f0;
            cvt.rn.bf16x2.f32 $1, f3, f2;
            }
            """,
            "=&r,=&r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        x = x.to(TYPE)
    return x


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
