"""3-D pooling in plain torch: the path of CPU tensors, and the oracle of the tests when fed float64.

The taps of a maximum, which the kernels keep as compact codes, are torch's flat int64 indices (d·H + h)·W + w here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from gpukern.ops._pool3d.problem import AdaptivePool, VolumePool
from gpukern.runtime.tensors import laid_out

_aten = torch.ops.aten
Problem = VolumePool | AdaptivePool


def taps_dtype(kernel: tuple[int, ...]) -> torch.dtype:
    return torch.int64


def max_pool3d(problem: Problem, input: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """``y[z, p, q] = max x[window]``: [N, C, D, H, W] gives [N, C, Z, P, Q]."""
    return max_pool3d_with_taps(problem, input, memory_format)[0]


def max_pool3d_with_taps(
    problem: Problem, input: torch.Tensor, memory_format: torch.memory_format
) -> tuple[torch.Tensor, torch.Tensor]:
    """The maximum and where it was found, both [N, C, Z, P, Q]."""
    # NCDHW: for a window of −∞ alone torch's path of channels_last_3d on CPUs reports a place in another plane.
    input = input.contiguous()
    if isinstance(problem, VolumePool):
        output, taps = F.max_pool3d(input, *_geometry(problem), return_indices=True)
        if max(problem.dilation) > 1:
            # Where no tap of a window is in the volume, torch's index is of a voxel that may not exist.
            taps = torch.where(_has_voxels(problem, input.device), taps, -1)
    else:
        output, taps = F.adaptive_max_pool3d(input, problem.result, return_indices=True)
    return laid_out(output, memory_format), laid_out(taps, memory_format)


def _has_voxels(problem: VolumePool, device: torch.device) -> torch.Tensor:
    """[Z, P, Q]: whether a window has a voxel of the volume."""
    geometry = zip(
        problem.image, problem.result, problem.kernel, problem.stride, problem.padding, problem.dilation, strict=True
    )
    inside = []
    for size, result, kernel, stride, padding, dilation in geometry:
        first = torch.arange(result, device=device) * stride - padding
        places = first[:, None] + torch.arange(kernel, device=device) * dilation
        inside.append(((places >= 0) & (places < size)).any(1))
    return inside[0][:, None, None] & inside[1][:, None] & inside[2]


def max_pool3d_indices(problem: Problem, taps: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """Return torch's int64 indices (d·H + h)·W + w [N, C, Z, P, Q]."""
    return laid_out(taps, memory_format).clone()


def max_pool3d_backward(
    problem: Problem, grad: torch.Tensor, taps: torch.Tensor, memory_format: torch.memory_format
) -> torch.Tensor:
    """``∂L/∂x[d, h, w] = Σ ∂L/∂y[z, p, q]`` over the outputs whose maximum is x[d, h, w]."""
    grad, dtype = _wide(grad)
    volume = grad.new_zeros(problem.N, problem.C, math.prod(problem.image))
    grad, taps = torch.where(taps < 0, 0, grad).flatten(2), taps.clamp(min=0).flatten(2)
    volume = volume.scatter_add(2, taps, grad).unflatten(2, problem.image)
    return laid_out(volume.to(dtype), memory_format)


def max_pool3d_gather(
    problem: Problem, image: torch.Tensor, taps: torch.Tensor, memory_format: torch.memory_format
) -> torch.Tensor:
    """``y[z, p, q] = image[tap of (z, p, q)]``: [N, C, D, H, W] gives [N, C, Z, P, Q]."""
    found = image.flatten(2).gather(2, taps.clamp(min=0).flatten(2)).unflatten(2, problem.result)
    return laid_out(torch.where(taps < 0, 0, found), memory_format)


def avg_pool3d(problem: Problem, input: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """``y[z, p, q] = Σ_{window} x / divisor``: [N, C, D, H, W] gives [N, C, Z, P, Q]."""
    input, dtype = _wide(input)
    if isinstance(problem, AdaptivePool):
        output = F.adaptive_avg_pool3d(input, problem.result)
    else:
        output = F.avg_pool3d(input, *_averages(problem))
    return laid_out(output.to(dtype), memory_format)


def avg_pool3d_backward(problem: Problem, grad: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """``∂L/∂x[d, h, w] = Σ ∂L/∂y[z, p, q] / divisor`` over the windows that contain (d, h, w)."""
    grad, dtype = _wide(grad)
    # torch's backward operators take the input but use only its shape.
    volume = grad.new_empty(problem.N, problem.C, *problem.image)
    if isinstance(problem, VolumePool):
        grad_input = _aten.avg_pool3d_backward(grad, volume, *_averages(problem))
    elif problem.C * math.prod(problem.result) == 0:  # torch's operator refuses it
        grad_input = volume.zero_()
    else:
        grad_input = _aten._adaptive_avg_pool3d_backward(grad, volume)
    return laid_out(grad_input.to(dtype), memory_format)


def _wide(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.dtype]:
    """(``tensor`` in a dtype that torch averages on a CPU, its own dtype)."""
    dtype = tensor.dtype
    return tensor.to(torch.promote_types(dtype, torch.float32)), dtype


def _geometry(problem: VolumePool) -> tuple:
    return problem.kernel, problem.stride, problem.padding, problem.dilation, problem.ceil_mode


def _averages(problem: VolumePool) -> tuple:
    window = problem.kernel, problem.stride, problem.padding, problem.ceil_mode
    return *window, problem.count_include_pad, problem.divisor_override
