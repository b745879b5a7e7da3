"""Activations as Triton functions on fp32 tiles, shared by the element-wise kernels and every fused epilogue."""

import triton
import triton.language as tl

# Written to the right of tensors: in the interpreter a constexpr times a tensor is not a tensor.
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_EIGHT_OVER_PI = tl.constexpr(1.5957691216057308)
_ONE_OVER_SQRT_TWO_PI = tl.constexpr(0.3989422804014327)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def apply_activation(x, NAME: tl.constexpr, negative_slope):
    """act(x) for an fp32 tile of any shape."""
    if NAME == "relu":
        # Not maximum(x, 0): a NaN must propagate.
        x = tl.where(x < 0.0, 0.0, x)
    elif NAME == "relu6":
        x = tl.where(x < 0.0, 0.0, tl.where(x > 6.0, 6.0, x))
    elif NAME == "leaky_relu":
        x = tl.where(x > 0.0, x, x * negative_slope)
    elif NAME == "sigmoid":
        x = tl.sigmoid(x)
    elif NAME == "hardsigmoid":
        x = _hardsigmoid(x)
    elif NAME == "tanh":
        x = _tanh(x)
    elif NAME == "silu":
        x = x * tl.sigmoid(x)
    elif NAME == "gelu":
        x = x * _normal_cdf(x)
    elif NAME == "gelu_tanh":
        x = x * tl.sigmoid(_gelu_tanh_argument(x))
    elif NAME == "hardswish":
        x = x * _hardsigmoid(x)
    return x


@triton.constexpr_function
def needs_input(name):
    """Whether ``activation_backward`` takes the activation's input: :data:`PROPERTIES`, where kernels can read it."""
    return name not in ("relu", "sigmoid", "tanh")


@triton.jit
def activation_backward(grad, saved, NAME: tl.constexpr, negative_slope):
    """grad · act′ for fp32 tiles; ``saved`` is the input of the activation where it needs it, else the output."""
    if NAME == "relu":
        # Not a product with 0 or 1: an infinite gradient times 0 would be NaN. A NaN in y lets the gradient through.
        out = tl.where(saved <= 0.0, 0.0, grad)
    elif NAME == "relu6":
        out = tl.where((saved <= 0.0) | (saved >= 6.0), 0.0, grad)
    elif NAME == "leaky_relu":
        out = tl.where(saved > 0.0, grad, grad * negative_slope)
    elif NAME == "sigmoid":
        out = grad * saved * (1.0 - saved)
    elif NAME == "hardsigmoid":
        # Unlike its other clamps, torch's gives no gradient for a NaN.
        out = tl.where((saved > -3.0) & (saved < 3.0), grad * (1.0 / 6.0), 0.0)
    elif NAME == "tanh":
        out = grad * (1.0 - saved * saved)
    elif NAME == "silu":
        # σ(−x) for 1 − σ(x), which cancels.
        out = grad * (tl.sigmoid(saved) * (1.0 + saved * tl.sigmoid(-saved)))
    elif NAME == "gelu":
        out = grad * (_normal_cdf(saved) + saved * _normal_density(saved))
    elif NAME == "gelu_tanh":
        u = _gelu_tanh_argument(saved)
        out = grad * (tl.sigmoid(u) * (1.0 + saved * tl.sigmoid(-u) * _gelu_tanh_slope(saved)))
    else:
        tl.static_assert(NAME == "hardswish")
        inner = grad * (saved * (1.0 / 3.0) + 0.5)
        out = tl.where(saved <= -3.0, 0.0, tl.where(saved < 3.0, inner, grad))
    return out


@triton.jit
def activation_curvature(saved, NAME: tl.constexpr):
    """The derivative by ``saved`` of act′, as ``activation_backward`` writes it. Zero for the piecewise linear ones."""
    if NAME == "sigmoid":
        out = 1.0 - 2.0 * saved
    elif NAME == "tanh":
        out = -2.0 * saved
    elif NAME == "silu":
        s = tl.sigmoid(saved)
        q = tl.sigmoid(-saved)
        out = s * q * (2.0 + saved * (q - s))
    elif NAME == "gelu":
        out = _normal_density(saved) * (2.0 - saved * saved)
    elif NAME == "gelu_tanh":
        # y = x σ(u): y″ = σ(u) σ(−u) (2 u′ + x u″ + x u′² (σ(−u) − σ(u)))
        u = _gelu_tanh_argument(saved)
        s = tl.sigmoid(u)
        q = tl.sigmoid(-u)
        slope = _gelu_tanh_slope(saved)
        bend = 6.0 * saved * _SQRT_EIGHT_OVER_PI * _CUBIC
        out = s * q * (2.0 * slope + saved * (bend + slope * slope * (q - s)))
    else:
        tl.static_assert(NAME == "hardswish")
        out = tl.where((saved > -3.0) & (saved < 3.0), 1.0 / 3.0, 0.0)
    return out


@triton.jit
def _hardsigmoid(x):
    # Comparisons, not minimum and maximum: a NaN must propagate.
    return tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, 1.0, (x + 3.0) * (1.0 / 6.0)))


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
def _normal_cdf(x):
    """Φ(x) = (1 + erf(x/√2)) / 2."""
    return 0.5 * (1.0 + tl.erf(x * _SQRT_HALF))


@triton.jit
def _normal_density(x):
    """φ(x) = exp(−x²/2) / √(2π)."""
    return tl.exp(-0.5 * x * x) * _ONE_OVER_SQRT_TWO_PI


@triton.jit
def _gelu_tanh_argument(x):
    """u with (1 + tanh(u/2)) / 2 = σ(u): gelu's tanh form is x σ(u), and σ does not cancel for large negative x."""
    return x * _SQRT_EIGHT_OVER_PI * (1.0 + x * x * _CUBIC)


@triton.jit
def _gelu_tanh_slope(x):
    """u′ of ``_gelu_tanh_argument``."""
    return (1.0 + 3.0 * x * x * _CUBIC) * _SQRT_EIGHT_OVER_PI
