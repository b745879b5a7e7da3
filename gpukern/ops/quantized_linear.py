"""The fully-connected layer in 8 bits, for inference: a 1×1 convolution over images of one pixel."""

from __future__ import annotations

import functools

import torch

from gpukern.ops.activation import check_activation
from gpukern.runtime.eight_bits import check_products, check_quantizable, described
from gpukern.runtime.integers import require
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import Operator
from gpukern.runtime.transforms import Batch

_implementations = Implementations("gpukern.conv.quantized")


def _check(input, weight, scale, bias, activation, negative_slope, output_scale, output_dtype) -> None:
    require(
        len(input.shape) == 2 and len(weight.shape) == 2,
        f"linear_quantized: expected input [rows, in_features] and weight [out_features, in_features], but got "
        f"{list(input.shape)} and {list(weight.shape)}",
    )
    rows, columns = input.shape, weight.shape
    require(
        rows[1] == columns[1],
        f"linear_quantized: input and weight shapes cannot be multiplied ({rows[0]}x{rows[1]} and "
        f"{columns[1]}x{columns[0]})",
    )
    check_products("linear_quantized", input, weight, scale, bias, columns[0], columns[1])
    check_quantizable("linear_quantized", output_scale, output_dtype, "output_scale")
    check_activation(activation, negative_slope)


#: A second call of the same kind is not checked again.
_check_once = functools.lru_cache(maxsize=4096)(_check)


def _forward(
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str,
    negative_slope: float,
    output_scale: float,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    operands = described(input), described(weight), described(scale), described(bias)
    _check_once(*operands, activation, negative_slope, output_scale, output_dtype)
    launch = _implementations.of(input).linear_quantized
    return launch(input, weight, scale, bias, activation, negative_slope, output_scale, output_dtype)


def _fake(input, weight, scale, bias, activation, negative_slope, output_scale, output_dtype) -> torch.Tensor:
    _check(input, weight, scale, bias, activation, negative_slope, output_scale, output_dtype)
    return input.new_empty((input.shape[0], weight.shape[0]), dtype=output_dtype)


def _flops(of_conv, input, weight, *_, **__) -> int:
    return 2 * input[0] * input[1] * weight[0]


#: ``act(s · x Wᵀ + b)`` of [M, C] with [K, C], gives [M, K]; dtypes, order of operations and rounding are those of
#: :data:`gpukern.ops.quantized_conv2d.conv2d_quantized`.
linear_quantized = Operator(
    "linear_quantized",
    "(Tensor input, Tensor weight, Tensor? scale, Tensor? bias, str activation, float negative_slope, "
    "float output_scale, ScalarType output_dtype) -> Tensor",
    forward=_forward,
    fake=_fake,
    batch=Batch(images=(0,)),
    flops=_flops,
)
