"""The convolution in plain torch: the path of CPU tensors, and the oracle of the tests when fed float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from gpukern.conv.problem import ConvProblem
from gpukern.ops._activation.reference import activation
from gpukern.runtime.tensors import as_memory_format, laid_out, memory_format_of


def conv2d(
    problem: ConvProblem,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation_name: str,
    negative_slope: float,
) -> torch.Tensor:
    """Compute ``act(x ∗ w + b + residual)``: [N, C, H, W] with [K, C/G, R, S] gives [N, K, P, Q]."""
    layout = memory_format_of(input, weight)
    padded, padding = _pad(problem, input)
    padded, weight, added = alike(padded, weight, bias, residual)
    if problem.C:
        y = F.conv2d(padded, weight, bias, problem.stride, padding, problem.dilation, problem.groups)
    else:  # empty sums, for which torch drops the output's channels
        y = padded.new_zeros(problem.N, problem.K, problem.P, problem.Q)
        y = y if bias is None else y + bias[:, None, None]
    y = activation(y if added is None else y + added, activation_name, negative_slope).to(input.dtype)
    return laid_out(y, layout)


def conv_transpose2d(
    problem: ConvProblem,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation_name: str,
    negative_slope: float,
) -> torch.Tensor:
    """Compute ``act(x ∗ᵀ w + b + residual)``: [N, K, P, Q] with [K, C/G, R, S] gives [N, C, H, W]."""
    p, layout = problem, memory_format_of(input, weight)
    # The remainder that the convolution's last window does not cover.
    extra = (
        (p.H + 2 * p.padding[0] - p.dilation[0] * (p.R - 1) - 1) % p.stride[0],
        (p.W + 2 * p.padding[2] - p.dilation[1] * (p.S - 1) - 1) % p.stride[1],
    )
    given, weight, added = alike(input, weight, bias, residual)
    y = F.conv_transpose2d(given, weight, bias, p.stride, (p.padding[0], p.padding[2]), extra, p.groups, p.dilation)
    y = activation(y if added is None else y + added, activation_name, negative_slope).to(input.dtype)
    return laid_out(y, layout)


def alike(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Convert all to the dtype of an fp32 bias: one rounding at the end, as in the kernels."""
    dtype = input.dtype if bias is None else torch.promote_types(input.dtype, bias.dtype)
    return input.to(dtype), with_usual_strides(weight.to(dtype)), None if residual is None else residual.to(dtype)


def with_usual_strides(weight: torch.Tensor) -> torch.Tensor:
    """A dense weight with the strides that its memory format has for dimensions of one element, too.

    torch's grouped convolutions on a CPU, by oneDNN, step by those from group to group: sums are wrong where the weight
    is in channels_last (findings/torch_grouped_convolution_steps_by_strides_of_one_element.sh).
    """
    if 1 not in weight.shape:
        return weight
    return laid_out(weight, memory_format_of(weight))


def conv2d_statistics(
    problem: ConvProblem, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute ``y = x ∗ w + b``, ``Σ y`` and ``Σ (y − mean)²`` over all but the channels, at least in fp32."""
    y = conv2d(problem, input, weight, bias, None, "none", 0.0)
    values = y.to(torch.promote_types(y.dtype, torch.float32))
    total = values.sum((0, 2, 3))
    if not y.numel():
        return y, total, torch.zeros_like(total)
    mean = values.mean((0, 2, 3), keepdim=True)
    return y, total, (values - mean).square().sum((0, 2, 3))


def conv2d_input_grad(
    problem: ConvProblem,
    grad: torch.Tensor,
    weight: torch.Tensor,
    channels_last: bool,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute ``∂L/∂x + added`` [N, C, H, W] from ``∂L/∂y`` [N, K, P, Q]."""
    image = grad.new_empty(problem.N, problem.C, problem.H, problem.W)
    grad_input, _ = _backward(problem, grad, image, weight, (True, False, False))
    if added is not None:
        grad_input = grad_input + added
    return laid_out(grad_input, as_memory_format(channels_last))


def conv2d_weight_grad(
    problem: ConvProblem, grad: torch.Tensor, input: torch.Tensor, channels_last: bool
) -> torch.Tensor:
    """Compute ``∂L/∂w`` [K, C/G, R, S] from ``∂L/∂y`` [N, K, P, Q] and ``x``."""
    weight = grad.new_empty(problem.K, problem.group_inputs, problem.R, problem.S)
    _, grad_weight = _backward(problem, grad, input, weight, (False, True, False))
    return laid_out(grad_weight, as_memory_format(channels_last))


def _pad(problem: ConvProblem, input: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    top, bottom, left, right = problem.padding
    if top == bottom and left == right:
        return input, (top, left)
    return F.pad(input, (left, right, top, bottom)), (0, 0)


def _backward(problem, grad, input, weight, mask) -> tuple[Any, Any]:
    padded, padding = _pad(problem, input)
    weight = with_usual_strides(weight)
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, padded, weight, None, problem.stride, padding, problem.dilation, False, (0, 0), problem.groups, mask
    )
    if grad_input is not None and padded is not input:
        top, _, left, _ = problem.padding
        grad_input = grad_input[:, :, top : top + problem.H, left : left + problem.W]
    return grad_input, grad_weight
