"""The numbers of a batch norm's channels, as its own kernels and the epilogues of convolutions take them."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Norm(NamedTuple):
    """The numbers of each channel, fp32 or of x's dtype: pointers to [C]; weight and bias may be None."""

    mean: Any
    variance: Any  # biased
    weight: Any
    bias: Any


@triton.jit
def load_numbers(ptr, c, valid, other: tl.constexpr):
    return tl.load(ptr + c, mask=valid, other=other).to(tl.float32)


@triton.jit
def affine(norm, variance, c, valid, eps):
    """(1 / standard deviation, weight / standard deviation, bias)."""
    # Correctly rounded: Triton's rsqrt is not.
    inverse = tl.div_rn(tl.full(variance.shape, 1.0, tl.float32), tl.sqrt_rn(variance + eps))
    scale = inverse
    if norm.weight is not None:
        scale = inverse * load_numbers(norm.weight, c, valid, 0.0)
    bias = tl.zeros(variance.shape, tl.float32)
    if norm.bias is not None:
        bias = load_numbers(norm.bias, c, valid, 0.0)
    return inverse, scale, bias
