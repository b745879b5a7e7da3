"""The fully-connected layer on the convolution's kernels: M images of one pixel and a 1×1 filter."""

from __future__ import annotations

import functools

import torch

from gpukern.ops._conv2d.launch import gather, weight_grad
from gpukern.ops._conv2d.prepare import Strides, prepare_gather, prepare_weight_grad
from gpukern.ops._conv2d.problem import ConvProblem
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.precision import matmul_precision


def linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str, negative_slope: float
) -> torch.Tensor:
    rows, inputs = input.shape
    outputs = weight.shape[0]
    dtype, device = input.dtype, input.device
    prepared = prepare_gather(
        _as_convolution(rows, inputs, outputs),
        False,
        _as_image(input.stride()),
        _as_image(weight.stride()),
        False,
        dtype,
        matmul_precision(dtype),
        activation,
        device_spec(device),
    )
    if bias is not None and bias.shape[0] != outputs:
        bias = bias.expand(outputs)
    output = torch.empty((rows, outputs), dtype=dtype, device=device)
    return gather(prepared, input, weight, bias, output, negative_slope)


def linear_weight_grad(grad: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    rows, inputs = input.shape
    outputs = grad.shape[1]
    dtype, device = grad.dtype, grad.device
    prepared = prepare_weight_grad(
        _as_convolution(rows, inputs, outputs),
        _as_image(grad.stride()),
        _as_image(input.stride()),
        False,
        dtype,
        matmul_precision(dtype),
        device_spec(device),
    )
    return weight_grad(prepared, grad, input, torch.empty((outputs, inputs), dtype=dtype, device=device))


@functools.lru_cache(maxsize=4096)
def _as_convolution(rows: int, inputs: int, outputs: int) -> ConvProblem:
    return ConvProblem(
        rows, inputs, 1, 1, outputs, 1, 1, 1, 1, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), groups=1
    )


def _as_image(strides: Strides) -> Strides:
    """The strides of a matrix [M, C] seen as M images of one pixel."""
    return (*strides, 0, 0)
