"""The activations and their derivatives in plain torch."""

from __future__ import annotations

import math

import torch

from gpukern.ops._activation.properties import PROPERTIES

_aten = torch.ops.aten

#: torch's operator of each name, except ``gelu_tanh``, which is a form of ``gelu``.
IN_TORCH = {
    "relu": _aten.relu.default,
    "relu6": _aten.relu6.default,
    "leaky_relu": _aten.leaky_relu.default,
    "sigmoid": _aten.sigmoid.default,
    "hardsigmoid": _aten.hardsigmoid.default,
    "tanh": _aten.tanh.default,
    "silu": _aten.silu.default,
    "gelu": _aten.gelu.default,
    "hardswish": _aten.hardswish.default,
}
#: These are x where x is large: torch multiplies by 2 or 6 on the way, which overflows, and its vectorized gelu
#: multiplies infinity by zero.
_OVERFLOWING = frozenset(("gelu", "hardswish"))


def in_torch(x: torch.Tensor, name: str, negative_slope: float) -> torch.Tensor:
    """``y = act(x)`` for a name of :data:`gpukern.ops.activation.ACTIVATIONS`; ``"none"`` returns ``x`` itself."""
    if name == "none":
        return x
    if name == "gelu_tanh":
        return _aten.gelu.default(x, approximate="tanh")
    return IN_TORCH[name](x, negative_slope) if name == "leaky_relu" else IN_TORCH[name](x)


def activation(x: torch.Tensor, name: str, negative_slope: float) -> torch.Tensor:
    """Compute :func:`in_torch` without intermediate overflow."""
    y = in_torch(x, name, negative_slope)
    return torch.where(x > 2.0**64, x, y) if name in _OVERFLOWING else y


def activation_of_kernels(x: torch.Tensor, name: str, negative_slope: float) -> torch.Tensor:
    """Compute :func:`activation` of fp32, piecewise linear ones in the kernels' operations, where torch divides: the
    same bits."""
    if name not in ("hardsigmoid", "hardswish"):
        return activation(x, name, negative_slope)
    share = torch.where(x <= -3.0, 0.0, torch.where(x >= 3.0, 1.0, (x + 3.0) * (1.0 / 6.0)))
    return share if name == "hardsigmoid" else x * share


def activation_(x: torch.Tensor, name: str, negative_slope: float) -> None:
    """Compute :func:`activation` in place."""
    x.copy_(activation(x, name, negative_slope))


def activation_grad(grad: torch.Tensor, saved: torch.Tensor, name: str, negative_slope: float) -> torch.Tensor:
    """``∂L/∂x = ∂L/∂y · act′``, where ``saved`` is the activation's input if its derivative needs it, else the output.

    Computed in fp32 at least.
    """
    dtype = torch.promote_types(saved.dtype, torch.float32)
    return _grad(grad.to(dtype), saved.to(dtype), name, negative_slope).to(saved.dtype)


def _grad(grad: torch.Tensor, saved: torch.Tensor, name: str, negative_slope: float) -> torch.Tensor:
    if name == "relu":
        return torch.where(saved <= 0, 0, grad)  # not saved > 0: a NaN lets the gradient through, as in torch
    if name == "relu6":
        return torch.where((saved <= 0) | (saved >= 6), 0, grad)
    if name == "leaky_relu":
        return torch.where(saved > 0, grad, grad * negative_slope)
    if name == "hardsigmoid":
        return torch.where((saved > -3) & (saved < 3), grad / 6, 0)
    if name == "hardswish":
        inner = grad * (saved / 3 + 0.5)
        return torch.where(saved <= -3, 0, torch.where(saved < 3, inner, grad))
    return grad * _slope(saved, name)


def _slope(saved: torch.Tensor, name: str) -> torch.Tensor:
    if name == "sigmoid":
        return saved * (1 - saved)
    if name == "tanh":
        return 1 - saved * saved
    if name == "silu":
        s = torch.sigmoid(saved)
        return s * (1 + saved * (1 - s))
    if name == "gelu":
        return (1 + torch.erf(saved / math.sqrt(2))) / 2 + saved * _density(saved)
    u, slope, _ = _gelu_tanh_argument(saved)
    s = torch.sigmoid(u)
    return s * (1 + saved * (1 - s) * slope)


def activation_grad_grad(grad: torch.Tensor, grad_grad: torch.Tensor, saved: torch.Tensor, name: str) -> torch.Tensor:
    """The derivative of :func:`activation_grad` by ``saved``, times ``grad_grad``: ``grad · grad_grad · ∂act′/∂saved``.

    Zero for the piecewise linear activations.
    """
    if PROPERTIES[name].piecewise_linear:
        return torch.zeros_like(saved)
    dtype = torch.promote_types(saved.dtype, torch.float32)
    return (grad.to(dtype) * grad_grad.to(dtype) * _curvature(saved.to(dtype), name)).to(saved.dtype)


def _curvature(saved: torch.Tensor, name: str) -> torch.Tensor:
    if name == "sigmoid":
        return 1 - 2 * saved
    if name == "tanh":
        return -2 * saved
    if name == "silu":
        s = torch.sigmoid(saved)
        return s * (1 - s) * (2 + saved * (1 - 2 * s))
    if name == "gelu":
        return _density(saved) * (2 - saved * saved)
    if name == "hardswish":
        return ((saved > -3) & (saved < 3)).to(saved.dtype) / 3
    u, slope, bend = _gelu_tanh_argument(saved)
    s = torch.sigmoid(u)
    return s * (1 - s) * (2 * slope + saved * (bend + slope * slope * (1 - 2 * s)))


def _density(x: torch.Tensor) -> torch.Tensor:
    """exp(−x²/2) / √(2π), the normal distribution's."""
    return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _gelu_tanh_argument(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(u, u′, u″) with gelu's tanh form = x · sigmoid(u): u = √(8/π) (x + 0.044715 x³)."""
    scale, cubic = math.sqrt(8 / math.pi), 0.044715
    return scale * x * (1 + cubic * x * x), scale * (1 + 3 * cubic * x * x), 6 * scale * cubic * x
