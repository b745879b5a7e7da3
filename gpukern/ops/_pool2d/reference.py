"""Pooling in plain torch: the path of CPU tensors, and the oracle of the tests when fed float64.

The taps of a maximum, which the kernels keep as compact codes, are torch's flat int64 indices h·W + w here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gpukern.ops._pool2d.problem import AdaptiveProblem, PoolProblem
from gpukern.runtime.eight_bits import LARGEST, in_8_bits, quantized
from gpukern.runtime.integers import cdiv
from gpukern.runtime.tensors import laid_out

_aten = torch.ops.aten


def taps_dtype(kernel: tuple[int, int]) -> torch.dtype:
    return torch.int64


def max_pool2d(problem: PoolProblem, input: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """``y[p, q] = max_{r,s} x[window]``: [N, C, H, W] gives [N, C, P, Q].

    In 8 bits a window without pixels gives the lowest value, −127 or −448, where others give −∞.
    """
    dtype = input.dtype
    if not in_8_bits(dtype):
        return laid_out(F.max_pool2d(input, *_geometry(problem)), memory_format)
    output = F.max_pool2d(input.float(), *_geometry(problem)).clamp(min=-LARGEST[dtype])
    return laid_out(output.to(dtype), memory_format)


def max_pool2d_with_taps(
    problem: PoolProblem, input: torch.Tensor, memory_format: torch.memory_format
) -> tuple[torch.Tensor, torch.Tensor]:
    """The maximum and where it was found, both [N, C, P, Q]."""
    output, taps = F.max_pool2d(input, *_geometry(problem), return_indices=True)
    if max(problem.dilation) > 1:
        # Where no tap of a window is in the image, torch's index is of a pixel that may not exist.
        taps = torch.where(_has_pixels(problem, input.device), taps, -1)
    return laid_out(output, memory_format), laid_out(taps, memory_format)


def _has_pixels(problem: PoolProblem, device: torch.device) -> torch.Tensor:
    """[P, Q]: whether a window has a pixel of the image."""
    sizes = (problem.H, problem.W), (problem.P, problem.Q)
    geometry = zip(*sizes, problem.kernel, problem.stride, problem.padding, problem.dilation, strict=True)
    inside = []
    for size, result, kernel, stride, padding, dilation in geometry:
        first = torch.arange(result, device=device) * stride - padding
        places = first[:, None] + torch.arange(kernel, device=device) * dilation
        inside.append(((places >= 0) & (places < size)).any(1))
    return inside[0][:, None] & inside[1]


def max_pool2d_indices(problem: PoolProblem, taps: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """Return torch's int64 indices h·W + w [N, C, P, Q]."""
    return laid_out(taps, memory_format).clone()


def max_pool2d_backward(
    problem: PoolProblem, grad: torch.Tensor, taps: torch.Tensor, memory_format: torch.memory_format
) -> torch.Tensor:
    """``∂L/∂x[h, w] = Σ ∂L/∂y[p, q]`` over the outputs whose maximum is x[h, w]."""
    if max(problem.dilation) > 1:
        grad, taps = torch.where(taps < 0, 0, grad), taps.clamp(min=0)
    grad, dtype = _wide(grad)
    grad_input = _aten.max_pool2d_with_indices_backward(
        grad, _image(problem, grad, memory_format), *_geometry(problem), taps
    )
    return laid_out(grad_input.to(dtype), memory_format)


def max_pool2d_gather(
    problem: PoolProblem, image: torch.Tensor, taps: torch.Tensor, memory_format: torch.memory_format
) -> torch.Tensor:
    """``y[p, q] = image[tap of (p, q)]``: [N, C, H, W] gives [N, C, P, Q]."""
    gathered = image.flatten(2).gather(2, taps.clamp(min=0).flatten(2)).unflatten(2, (problem.P, problem.Q))
    return laid_out(torch.where(taps < 0, 0, gathered), memory_format)


def avg_pool2d(
    problem: PoolProblem | AdaptiveProblem, input: torch.Tensor, memory_format: torch.memory_format
) -> torch.Tensor:
    """``y[p, q] = Σ_{window} x / divisor``: [N, C, H, W] gives [N, C, P, Q]."""
    if isinstance(problem, AdaptiveProblem):
        output = F.adaptive_avg_pool2d(input, (problem.P, problem.Q))
    else:
        output = F.avg_pool2d(input, *_average(problem))
    return laid_out(output, memory_format)


def avg_pool2d_quantized(
    problem: PoolProblem | AdaptiveProblem,
    input: torch.Tensor,
    memory_format: torch.memory_format,
    input_scale: float,
    output_scale: float,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    """``y[p, q] = (Σ_{window} q) · (input_scale / divisor)``, each step in fp32, then in the scale of the output."""
    total, divisor = _sums_and_divisors(problem, input.double())
    factor = torch.tensor(input_scale, dtype=torch.float32, device=input.device) / divisor
    y = total.float() * factor
    y = quantized(y, output_scale, output_dtype) if in_8_bits(output_dtype) else y.to(output_dtype)
    return laid_out(y, memory_format)


def _sums_and_divisors(
    problem: PoolProblem | AdaptiveProblem, input: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums [N, C, P, Q] of windows of 8-bit values, exact in fp64; what each is divided by, [P, Q] in fp32."""
    if isinstance(problem, PoolProblem):
        p = problem
        sums = F.avg_pool2d(input, p.kernel, p.stride, p.padding, p.ceil_mode, divisor_override=1)
        sizes = (problem.H, problem.W), (problem.P, problem.Q)
        rows, columns = map(
            _counts, *sizes, problem.kernel, problem.stride, problem.padding, (problem.count_include_pad,) * 2
        )
        divisors = [[problem.divisor_override or r * c for c in columns] for r in rows]
    else:
        rows, columns = _shares(problem.H, problem.P), _shares(problem.W, problem.Q)
        divisors = [[r * c for c in columns] for r in rows]
        means = F.adaptive_avg_pool2d(input, (problem.P, problem.Q))
        # 8-bit values are multiples of 2⁻⁹, and so are their sums: that removes the errors of division and product.
        sums = (means * torch.tensor(divisors).to(means).view(problem.P, problem.Q) * 512).round() / 512
    return sums, torch.tensor(divisors, dtype=torch.float32, device=input.device).view(problem.P, problem.Q)


def _counts(size: int, outputs: int, kernel: int, stride: int, padding: int, include_pad: bool) -> list[int]:
    """How many places of each window count, along one dimension."""
    around = padding if include_pad else 0
    starts = [i * stride - padding for i in range(outputs)]
    return [min(start + kernel, size + around) - max(start, -around) for start in starts]


def _shares(size: int, parts: int) -> list[int]:
    return [cdiv((i + 1) * size, parts) - i * size // parts for i in range(parts)]


def avg_pool2d_backward(
    problem: PoolProblem | AdaptiveProblem, grad: torch.Tensor, memory_format: torch.memory_format
) -> torch.Tensor:
    """``∂L/∂x[h, w] = Σ ∂L/∂y[p, q] / divisor`` over the windows that contain (h, w)."""
    grad, dtype = _wide(grad)
    image = _image(problem, grad, memory_format)
    if isinstance(problem, PoolProblem):
        grad_input = _aten.avg_pool2d_backward(grad, image, *_average(problem))
    elif problem.C * problem.P * problem.Q == 0:  # torch's operator refuses it
        grad_input = image.zero_()
    else:
        grad_input = _aten._adaptive_avg_pool2d_backward(grad, image)
    return laid_out(grad_input.to(dtype), memory_format)


def _wide(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.dtype]:
    """(``tensor`` in a dtype whose sums torch does not round to 16 bits on a CPU, its own dtype)."""
    dtype = tensor.dtype
    return tensor.to(torch.promote_types(dtype, torch.float32)), dtype


def _geometry(problem: PoolProblem) -> tuple:
    return problem.kernel, problem.stride, problem.padding, problem.dilation, problem.ceil_mode


def _average(problem: PoolProblem) -> tuple:
    return (
        problem.kernel,
        problem.stride,
        problem.padding,
        problem.ceil_mode,
        problem.count_include_pad,
        problem.divisor_override,
    )


def _image(
    problem: PoolProblem | AdaptiveProblem, like: torch.Tensor, memory_format: torch.memory_format
) -> torch.Tensor:
    """Allocate an uninitialised [N, C, H, W]: torch's backward operators take the input but use only its layout."""
    shape = (problem.N, problem.C, problem.H, problem.W)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)
