"""Activations as Triton functions on fp32 tiles, shared by the element-wise kernels and every fused epilogue."""

import triton
import triton.language as tl


@triton.jit
def apply_activation(x, NAME: tl.constexpr, negative_slope):
    """act(x) for an fp32 tile of any shape."""
    if NAME == "relu":
        # Not maximum(x, 0): a NaN must come through.
        x = tl.where(x < 0.0, 0.0, x)
    elif NAME == "leaky_relu":
        x = tl.where(x > 0.0, x, x * negative_slope)
    elif NAME == "sigmoid":
        x = tl.sigmoid(x)
    elif NAME == "tanh":
        x = _tanh(x)
    return x


@triton.jit
def _tanh(x):
    a = tl.abs(x)
    # tanh(a) = (1 − e^(−2a)) / (1 + e^(−2a)): no overflow. Below 0.125 the numerator cancels, so the odd Taylor
    # series is used there; its first neglected term is 62/2835 · a⁹ < 2⁻²⁸ of the result.
    e = tl.exp(-2.0 * a)
    large = (1.0 - e) / (1.0 + e)
    s = x * x
    small = a * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0))))
    y = tl.where(a < 0.125, small, large)
    return tl.where(x < 0.0, -y, y)


@triton.jit
def activation_backward(grad, y, NAME: tl.constexpr, negative_slope):
    """grad · act′, the derivative in terms of the output y = act(x), for fp32 tiles."""
    if NAME == "relu":
        # Not a product with 0 or 1: an infinite gradient times 0 would be NaN. A NaN in y lets the gradient through.
        out = tl.where(y <= 0.0, 0.0, grad)
    elif NAME == "leaky_relu":
        out = tl.where(y > 0.0, grad, grad * negative_slope)
    elif NAME == "sigmoid":
        out = grad * y * (1.0 - y)
    else:
        out = grad * (1.0 - y * y)
    return out
