"""Epilogue of an input gradient that goes on through the batch norm before the convolution, as far as its sums.

With ``y = act(u)``, ``u = x̂ · weight + bias + residual``, ``x̂ = (z − mean) / σ`` and a convolution of y, ∂L/∂y is
multiplied with act′(u) while it is in registers. See :mod:`gpukern.ops.conv_norm_grad`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gpukern.ops._activation.functions import activation_backward, apply_activation, needs_input
from gpukern.ops._normalization import affine, load_numbers
from gpukern.ops._reduction.functions import store_part


class NormGrad(NamedTuple):
    """The batch norm's numbers of each channel: pointers to [C]."""

    mean: Any
    variance: Any  # biased
    weight: Any  # or None
    bias: Any  # or None
    eps: Any


@triton.jit
def norm_numbers(norm, channel, valid):
    """Return (mean, 1/σ, weight/σ, bias) of each ``channel``, a tile of any shape."""
    variance = load_numbers(norm.variance, channel, valid, 1.0)
    inverse, scale, bias = affine(norm, variance, channel, valid, norm.eps)
    return load_numbers(norm.mean, channel, valid, 0.0), inverse, scale, bias


@triton.jit
def along_pixels(numbers, AXIS: tl.constexpr):
    """Return :func:`norm_numbers` of [channels] with a dimension for the pixels, AXIS."""
    mean, inverse, scale, bias = numbers
    mean = tl.expand_dims(mean, AXIS)
    return mean, tl.expand_dims(inverse, AXIS), tl.expand_dims(scale, AXIS), tl.expand_dims(bias, AXIS)


@triton.jit
def inner_gradient(grad, z, other, numbers, negative_slope, ACTIVATION: tl.constexpr):
    """Return (∂L/∂u, z − mean) for fp32 tiles ``grad`` = ∂L/∂y and ``z``.

    ``other`` is the residual where act′ needs its input, else y; None without a residual.
    """
    mean, _, scale, bias = numbers
    # The difference first, as in the norm's forward: the same u, to the bit.
    from_mean = z - mean
    if ACTIVATION != "none":
        saved = from_mean * scale + bias
        if other is not None:
            saved = saved + other if needs_input(ACTIVATION) else other
        elif not needs_input(ACTIVATION):
            saved = apply_activation(saved, ACTIVATION, negative_slope)
        grad = activation_backward(grad, saved, ACTIVATION, negative_slope)
    return grad, from_mean


@triton.jit
def store_norm_sums(g, from_mean, valid, inverse, sums, tile, tiles, channel, channels, AXIS: tl.constexpr):
    """Write each channel's Σ g and Σ g·x̂ over the tile's ``valid`` pixels, along AXIS; ``g`` is rounded as stored.

    Once all parts of a tile are stored, the program calls ``merge_sums``.
    """
    g = tl.where(valid, g, 0.0)
    values = tl.sum(g, AXIS), tl.sum(g * from_mean, AXIS) * inverse
    store_part(sums.parts, values, tile, tiles, channel, channel < channels, channels)
