"""The activations and their derivatives in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def activation(x: torch.Tensor, name: str, negative_slope: float) -> torch.Tensor:
    """``y = act(x)`` for a name of :data:`gpukern.ops.activation.ACTIVATIONS`; ``"none"`` returns ``x`` itself."""
    if name == "none":
        return x
    if name == "relu":
        return F.relu(x)
    if name == "leaky_relu":
        return F.leaky_relu(x, negative_slope)
    if name == "sigmoid":
        return torch.sigmoid(x)
    return torch.tanh(x)


def activation_(x: torch.Tensor, name: str, negative_slope: float) -> None:
    """:func:`activation` in place."""
    x.copy_(activation(x, name, negative_slope))


def activation_grad(grad: torch.Tensor, y: torch.Tensor, name: str, negative_slope: float) -> torch.Tensor:
    """``∂L/∂x = ∂L/∂y · act′``, with the derivative written in terms of the output ``y = act(x)``."""
    if name == "relu":
        return torch.where(y <= 0, 0, grad)  # not y > 0: a NaN lets the gradient through, as in torch
    if name == "leaky_relu":
        return torch.where(y > 0, grad, grad * negative_slope)
    if name == "sigmoid":
        return grad * y * (1 - y)
    return grad * (1 - y * y)


def activation_grad_grad(grad: torch.Tensor, grad_grad: torch.Tensor, y: torch.Tensor, name: str) -> torch.Tensor:
    """The derivative of :func:`activation_grad` by ``y``, times ``grad_grad``: ``grad · grad_grad · ∂act′/∂y``.

    Zero for the piecewise linear activations.
    """
    if name == "sigmoid":
        return grad * grad_grad * (1 - 2 * y)
    if name == "tanh":
        return grad * grad_grad * (-2 * y)
    return torch.zeros_like(y)
