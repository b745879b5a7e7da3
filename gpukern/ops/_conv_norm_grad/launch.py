"""An input gradient through the batch norm before the convolution, by the kernels."""

from __future__ import annotations

import torch

from gpukern.conv import ConvProblem, Direction, Epilogue, NormBefore, prepared_for, run
from gpukern.conv import conv2d_input_grad_norm as input_grad_norm
from gpukern.ops._batch_norm.launch import inner_gradient_and_sums


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
    norm = NormBefore(z, mean, variance, norm_weight, norm_bias, other, eps)
    found = input_grad_norm(problem, grad, weight, channels_last, added, norm, activation, negative_slope)
    if found is not None:
        return found
    epilogue = Epilogue(residual=added is not None)
    prepared = prepared_for(problem, Direction.INPUT_GRAD, grad, weight, channels_last, epilogue)
    by_y, _ = run(prepared, grad, weight, None, added)
    if by_y.numel() == 0:
        return by_y, torch.zeros((2, problem.C), dtype=torch.float32, device=grad.device)
    return inner_gradient_and_sums(
        by_y, z, norm_weight, norm_bias, other, mean, variance, eps, activation, negative_slope
    )
