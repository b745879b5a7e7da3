"""Convolutions in 8 bits in plain torch: the path of CPU tensors, and the oracle of the tests.

Sums of products of int8 are exact. What follows a sum is fp32, each operation rounded by itself and in the kernels'
order, so that both give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from gpukern.conv import reference
from gpukern.conv.pooled.problem import POOL_WINDOWS
from gpukern.conv.problem import ConvProblem
from gpukern.ops._activation.reference import activation_of_kernels
from gpukern.runtime.eight_bits import in_8_bits, quantized
from gpukern.runtime.tensors import laid_out, memory_format_of

#: fp32 holds every integer up to here.
_EXACT = 2**24


def conv2d_quantized(
    problem: ConvProblem,
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    negative_slope: float,
    residual_scale: float,
    output_scale: float,
    output_dtype: torch.dtype,
    pool: bool,
) -> torch.Tensor:
    """Compute ``act(s · (x ∗ w) + b + residual)`` in ``output_dtype``, pooled if ``pool``; see ``ops``."""
    y = _sums(input, weight, (1, 2, 3), lambda x, w: reference.conv2d(problem, x, w, None, None, "none", 0.0))
    y = epilogue(y, scale, bias, residual, residual_scale, activation, negative_slope)
    if pool:
        y = F.max_pool2d(y, *POOL_WINDOWS[:2])
    return laid_out(rounded(y, output_scale, output_dtype), memory_format_of(input, weight))


def conv_transpose2d_quantized(
    problem: ConvProblem,
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    negative_slope: float,
    residual_scale: float,
    output_scale: float,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    """Compute ``act(s · (x ∗ᵀ w) + b + residual)`` in ``output_dtype``; see ``ops``."""
    y = _sums(input, weight, (0, 2, 3), lambda x, w: reference.conv_transpose2d(problem, x, w, None, None, "none", 0.0))
    y = epilogue(y, scale, bias, residual, residual_scale, activation, negative_slope)
    return laid_out(rounded(y, output_scale, output_dtype), memory_format_of(input, weight))


def linear_quantized(
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str,
    negative_slope: float,
    output_scale: float,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    """Compute ``act(s · x Wᵀ + b)`` in ``output_dtype``; see ``ops``."""
    y = _sums(input, weight, (1,), F.linear)
    y = epilogue(y, scale, bias, None, 1.0, activation, negative_slope)
    return rounded(y, output_scale, output_dtype)


def _sums(
    input: torch.Tensor,
    weight: torch.Tensor,
    summed: tuple[int, ...],
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The sums of products in fp32; ``summed`` are the dimensions of ``weight`` that a sum goes over, or more.

    Of int8 they are the exact sums, rounded once where fp32 does not hold them.
    """
    x, w = input.to(torch.float32), weight.to(torch.float32)
    whole = input.dtype is torch.int8 and weight.dtype is torch.int8 and w.numel()
    # No partial sum is larger than this, in whatever order the products are added.
    if whole and 128 * w.abs().sum(summed).max() > _EXACT:
        return product(x.to(torch.float64), w.to(torch.float64)).to(torch.float32)
    return product(x, w)


def epilogue(
    sums: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    residual_scale: float,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    """``act(sums · scale + bias + residual · residual_scale)``, rounded after each operation."""
    by_channel = -1, *(1,) * (sums.dim() - 2)
    y = sums
    if scale is not None:
        y = y * scale.view(by_channel)
    if bias is not None:
        y = y + bias.to(torch.float32).view(by_channel)
    if residual is not None:
        y = y + residual.to(torch.float32) * residual_scale
    return activation_of_kernels(y, activation, negative_slope)


def rounded(y: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """``y`` in fp32 as it is stored."""
    return quantized(y, scale, dtype) if in_8_bits(dtype) else y.to(dtype)
