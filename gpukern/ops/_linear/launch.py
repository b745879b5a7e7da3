"""The fully-connected layer on the convolution's kernels: M images of one pixel and a 1×1 filter."""

from __future__ import annotations

import torch

from gpukern.conv import ConvProblem, Direction, Epilogue, Prepared, matrix_problem, prepare_launch, write
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.precision import matmul_precision


def linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str, negative_slope: float
) -> torch.Tensor:
    outputs, inputs = weight.shape
    problem = matrix_problem(input.shape[0], inputs, outputs)
    prepared = _prepared(problem, Direction.FORWARD, input, weight, activation)
    if bias is not None and bias.shape[0] != outputs:
        bias = bias.expand(outputs)
    output = input.new_empty_strided((problem.N, outputs), (max(outputs, 1), 1))
    write(prepared, output, input, weight, bias, None, negative_slope)
    return output


def linear_weight_grad(grad: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    (rows, inputs), outputs = input.shape, grad.shape[1]
    prepared = _prepared(matrix_problem(rows, inputs, outputs), Direction.WEIGHT_GRAD, grad, input)
    output = grad.new_empty_strided((outputs, inputs), (max(inputs, 1), 1))
    write(prepared, output, grad, input)
    return output


def _prepared(
    problem: ConvProblem, direction: Direction, first: torch.Tensor, second: torch.Tensor, activation: str = "none"
) -> Prepared:
    """Return the launch for matrices [M, C] as M images of one pixel."""
    return prepare_launch(
        problem,
        direction,
        (*first.stride(), 0, 0),
        (*second.stride(), 0, 0),
        False,
        (first.data_ptr() | second.data_ptr()) % 16 == 0,
        first.dtype,
        matmul_precision(first.dtype),
        device_spec(first.device),
        Epilogue(activation),
    )
