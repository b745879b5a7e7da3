"""An input gradient through the batch norm before the convolution, in plain torch: the path of CPU tensors."""

from __future__ import annotations

import torch

from gpukern.conv import ConvProblem, reference
from gpukern.ops._batch_norm.reference import inner_gradient, pixels_of


def conv2d_input_grad_norm(
    problem: ConvProblem,
    grad: torch.Tensor,
    weight: torch.Tensor,
    channels_last: bool,
    added: torch.Tensor | None,
    z: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    other: torch.Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(g, sums) of :func:`gpukern.ops.conv_norm_grad.conv2d_input_grad_norm`, in fp32 at least and rounded once."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    by_y = reference.conv2d_input_grad(problem, grad.to(dtype), weight.to(dtype), channels_last)
    if added is not None:
        by_y = by_y + added
    inner, normal, _ = inner_gradient(
        by_y, z, norm_weight, norm_bias, other, mean, variance, eps, activation, negative_slope
    )
    g = torch.empty_like(by_y, dtype=grad.dtype).copy_(inner)
    stored = g.to(dtype)
    return g, torch.stack([stored.sum(pixels_of(z)), (stored * normal).sum(pixels_of(z))])
