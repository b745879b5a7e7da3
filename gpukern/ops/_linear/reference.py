"""The fully-connected layer in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gpukern.ops._activation.reference import activation


def linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation_name: str, negative_slope: float
) -> torch.Tensor:
    """Compute ``act(x Wᵀ + b)``: [M, C] with [K, C] gives [M, K]."""
    # A bias in fp32 beside halves: one rounding at the end, as in the kernels.
    dtype = input.dtype if bias is None else torch.promote_types(input.dtype, bias.dtype)
    y = F.linear(input.to(dtype), weight.to(dtype), bias)
    return activation(y, activation_name, negative_slope).to(input.dtype)


def linear_weight_grad(grad: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    """``∂L/∂W`` [K, C] from ``∂L/∂y`` [M, K] and ``x`` [M, C]."""
    return grad.t() @ input
