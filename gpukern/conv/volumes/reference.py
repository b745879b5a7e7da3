"""The convolution of volumes in plain torch: the path of CPU tensors, and the oracle of the tests in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from gpukern.conv.reference import alike, with_usual_strides
from gpukern.conv.volumes.problem import Triple, VolumeProblem
from gpukern.ops._activation.reference import activation
from gpukern.runtime.tensors import as_memory_format, laid_out, memory_format_of


def conv3d(
    problem: VolumeProblem,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation_name: str,
    negative_slope: float,
) -> torch.Tensor:
    """Compute ``act(x ∗ w + b + residual)``: [N, C, D, H, W] with [K, C/G, T, R, S] gives [N, K, Z, P, Q]."""
    layout = memory_format_of(input, weight)
    padded, padding = _pad(problem, input)
    padded, weight, added = alike(padded, weight, bias, residual)
    if problem.C and problem.N:
        y = F.conv3d(padded, weight, bias, problem.stride, padding, problem.dilation, problem.groups)
    else:  # empty sums, for which torch drops the output's channels, and none at all, which not all its paths take
        y = padded.new_zeros(problem.shapes[2])
        y = y if bias is None else y + bias[:, None, None, None]
    y = activation(y if added is None else y + added, activation_name, negative_slope).to(input.dtype)
    return laid_out(y, layout)


def conv_transpose3d(
    problem: VolumeProblem,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation_name: str,
    negative_slope: float,
) -> torch.Tensor:
    """Compute ``act(x ∗ᵀ w + b + residual)``: [N, K, Z, P, Q] with [K, C/G, T, R, S] gives [N, C, D, H, W]."""
    p, layout = problem, memory_format_of(input, weight)
    # The remainder that the convolution's last window does not cover.
    sizes = zip(p.image, p.before, p.dilation, p.taps, p.stride, strict=True)
    extra = [(size + 2 * pad - spread * (taps - 1) - 1) % step for size, pad, spread, taps, step in sizes]
    given, weight, added = alike(input, weight, bias, residual)
    y = F.conv_transpose3d(given, weight, bias, p.stride, p.before, extra, p.groups, p.dilation)
    y = activation(y if added is None else y + added, activation_name, negative_slope).to(input.dtype)
    return laid_out(y, layout)


def conv3d_input_grad(
    problem: VolumeProblem, grad: torch.Tensor, weight: torch.Tensor, channels_last: bool
) -> torch.Tensor:
    """Compute ``∂L/∂x`` [N, C, D, H, W] from ``∂L/∂y`` [N, K, Z, P, Q]."""
    grad_input, _ = _backward(problem, grad, grad.new_empty(problem.shapes[0]), weight, (True, False, False))
    return laid_out(grad_input, as_memory_format(channels_last, 5))


def conv3d_weight_grad(
    problem: VolumeProblem, grad: torch.Tensor, input: torch.Tensor, channels_last: bool
) -> torch.Tensor:
    """Compute ``∂L/∂w`` [K, C/G, T, R, S] from ``∂L/∂y`` [N, K, Z, P, Q] and ``x``."""
    _, grad_weight = _backward(problem, grad, input, grad.new_empty(problem.shapes[1]), (False, True, False))
    return laid_out(grad_weight, as_memory_format(channels_last, 5))


def _pad(problem: VolumeProblem, input: torch.Tensor) -> tuple[torch.Tensor, Triple]:
    front, back, top, bottom, left, right = problem.padding
    if (front, top, left) == (back, bottom, right):
        return input, problem.before
    return F.pad(input, (left, right, top, bottom, front, back)), (0, 0, 0)


def _backward(problem, grad, input, weight, mask) -> tuple[Any, Any]:
    padded, padding = _pad(problem, input)
    weight = with_usual_strides(weight)
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, padded, weight, None, problem.stride, padding, problem.dilation, False, (0, 0, 0), problem.groups, mask
    )
    if grad_input is not None and padded is not input:
        (front, top, left), (D, H, W) = problem.before, problem.image
        grad_input = grad_input[:, :, front : front + D, top : top + H, left : left + W]
    return grad_input, grad_weight
