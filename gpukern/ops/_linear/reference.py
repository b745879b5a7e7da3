"""The fully-connected layer in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gpukern.ops._activation.reference import activation


def linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation_name: str, negative_slope: float
) -> torch.Tensor:
    """``act(x Wᵀ + b)``: [M, C] with [K, C] gives [M, K]."""
    return activation(F.linear(input, weight, bias), activation_name, negative_slope)


def linear_weight_grad(grad: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    """``∂L/∂W`` [K, C] from ``∂L/∂y`` [M, K] and ``x`` [M, C]."""
    return grad.t() @ input
