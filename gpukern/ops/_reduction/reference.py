"""Sums over all but the channels in plain torch: the path of CPU tensors, and the oracle of the tests."""

from __future__ import annotations

import torch

from gpukern.ops._activation.reference import activation_grad


def channel_sum(grad: torch.Tensor) -> torch.Tensor:
    """``∂L/∂b`` [K]: the sum of [N, K, P, Q] over all but the channels."""
    return grad.sum([dim for dim in range(grad.dim()) if dim != 1])


def activation_grad_sum(
    grad: torch.Tensor, output: torch.Tensor, activation_name: str, negative_slope: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``∂L/∂z = ∂L/∂y · act′`` from ``y = act(z)``, and its :func:`channel_sum`."""
    inner = torch.empty_like(output).copy_(activation_grad(grad, output, activation_name, negative_slope))
    return inner, channel_sum(inner)
