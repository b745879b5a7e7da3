"""The fully-connected layer on the convolution's kernels: M images of one pixel and a 1×1 filter."""

from __future__ import annotations

import functools

import torch

from gpukern.ops._conv2d.launch import gather, weight_grad
from gpukern.ops._conv2d.plan import Direction
from gpukern.ops._conv2d.problem import ConvProblem
from gpukern.runtime.precision import matmul_precision
from gpukern.runtime.tensors import check_kernel_dtype


def linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str, negative_slope: float
) -> torch.Tensor:
    check_kernel_dtype("linear", input)
    problem = _as_convolution(input.shape[0], input.shape[1], weight.shape[0])
    output = torch.empty((input.shape[0], weight.shape[0]), dtype=input.dtype, device=input.device)
    if bias is not None and bias.shape[0] != weight.shape[0]:
        bias = bias.expand(weight.shape[0]).contiguous()
    gather(
        problem,
        Direction.FORWARD,
        _as_image(input),
        _as_image(weight),
        bias,
        _as_image(output),
        matmul_precision(input.dtype),
        activation,
        negative_slope,
    )
    return output


def linear_weight_grad(grad: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    check_kernel_dtype("linear_weight_grad", grad)
    problem = _as_convolution(input.shape[0], input.shape[1], grad.shape[1])
    output = torch.empty((grad.shape[1], input.shape[1]), dtype=grad.dtype, device=grad.device)
    weight_grad(problem, _as_image(grad), _as_image(input), _as_image(output), matmul_precision(grad.dtype))
    return output


@functools.lru_cache(maxsize=4096)
def _as_convolution(rows: int, inputs: int, outputs: int) -> ConvProblem:
    return ConvProblem(
        rows, inputs, 1, 1, outputs, 1, 1, 1, 1, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), groups=1
    )


def _as_image(matrix: torch.Tensor) -> torch.Tensor:
    return matrix[:, :, None, None]
