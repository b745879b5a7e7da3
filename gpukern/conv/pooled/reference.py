"""``max_pool2d(act(x ∗ w + b), 2)`` in plain torch: the path of CPU tensors, and the oracle of the tests."""

from __future__ import annotations

import torch

from gpukern.conv.pooled.problem import windows_of
from gpukern.conv.problem import ConvProblem
from gpukern.conv.reference import conv2d
from gpukern.ops._pool2d.reference import max_pool2d
from gpukern.runtime.tensors import memory_format_of


def conv2d_max_pool2d(
    problem: ConvProblem,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    """Convolve and pool: [N, C, H, W] with [K, C/G, R, S] gives [N, K, ⌊P/2⌋, ⌊Q/2⌋]."""
    y = conv2d(problem, input, weight, bias, None, activation, negative_slope)
    return max_pool2d(windows_of(problem), y, memory_format_of(input, weight))
