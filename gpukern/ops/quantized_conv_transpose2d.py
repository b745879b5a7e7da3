"""2-D transposed convolution in 8 bits, for inference, on the convolution's kernels."""

from __future__ import annotations

import functools
from typing import Any

import torch

from gpukern.conv import ConvProblem, Pair, transposed_problem, transposed_size
from gpukern.ops.activation import check_activation
from gpukern.ops.conv2d import check_residual as check_residual_shape
from gpukern.ops.conv2d import transposed_flops
from gpukern.runtime.eight_bits import Checked, check_products, check_quantizable, check_residual, described
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import Operator
from gpukern.runtime.tensors import memory_format_of
from gpukern.runtime.transforms import Batch

_implementations = Implementations("gpukern.conv.quantized")


def _output_shape(
    input: Checked,
    weight: Checked,
    scale: Checked | None,
    bias: Checked | None,
    residual: Checked | None,
    stride: Pair,
    padding: Pair,
    output_padding: Pair,
    dilation: Pair,
    groups: int,
    activation: str,
    negative_slope: float,
    residual_scale: float,
    output_scale: float,
    output_dtype: torch.dtype,
) -> tuple[int, int, int, int]:
    """[N, C, H, W]; RuntimeError for anything that does not fit together."""
    geometry, bias_shape = (stride, padding, output_padding, dilation, groups), None if bias is None else bias.shape
    H, W = transposed_size(input.shape, weight.shape, bias_shape, *geometry)
    summed, made, R, S = weight.shape
    shape = input.shape[0], made * groups, H, W
    check_products("conv_transpose2d_quantized", input, weight, scale, bias, shape[1], summed // groups * R * S)
    check_quantizable("conv_transpose2d_quantized", output_scale, output_dtype, "output_scale")
    check_activation(activation, negative_slope)
    if residual is not None:
        check_residual("conv_transpose2d_quantized", input, residual, residual_scale)
        check_residual_shape(residual, shape)
    return shape


@functools.lru_cache(maxsize=4096)
def _problem(
    input: Checked,
    weight: Checked,
    scale: Checked | None,
    bias: Checked | None,
    residual: Checked | None,
    stride: Pair,
    padding: Pair,
    output_padding: Pair,
    dilation: Pair,
    groups: int,
    *epilogue: Any,
) -> ConvProblem:
    """The problem of checked operands: a second call of the same kind is not checked again."""
    geometry = stride, padding, output_padding, dilation, groups
    _output_shape(input, weight, scale, bias, residual, *geometry, *epilogue)
    return transposed_problem(input.shape, weight.shape, None if bias is None else bias.shape, *geometry)


def _forward(
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: Pair,
    padding: Pair,
    output_padding: Pair,
    dilation: Pair,
    groups: int,
    activation: str,
    negative_slope: float,
    residual_scale: float,
    output_scale: float,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    geometry, written = (
        (stride, padding, output_padding, dilation, groups),
        (residual_scale, output_scale, output_dtype),
    )
    operands = described(input), described(weight), described(scale), described(bias), described(residual)
    problem = _problem(*operands, *geometry, activation, negative_slope, *written)
    launch = _implementations.of(input).conv_transpose2d_quantized
    return launch(problem, input, weight, scale, bias, residual, activation, negative_slope, *written)


def _fake(
    input, weight, scale, bias, residual, stride, padding, output_padding, dilation, groups, activation, negative_slope,
    *written,
) -> torch.Tensor:  # fmt: skip
    geometry = stride, padding, output_padding, dilation, groups
    shape = _output_shape(input, weight, scale, bias, residual, *geometry, activation, negative_slope, *written)
    return input.new_empty(shape, dtype=written[2]).to(memory_format=memory_format_of(input, weight))


#: :data:`gpukern.ops.quantized_conv2d.conv2d_quantized` of the transposed convolution: [N, K, P, Q] with
#: [K, C/groups, R, S] gives [N, C, H, W]; ``scale`` and ``bias`` are [C], ``output_padding`` below the stride.
conv_transpose2d_quantized = Operator(
    "conv_transpose2d_quantized",
    "(Tensor input, Tensor weight, Tensor? scale, Tensor? bias, Tensor? residual, int[] stride, int[] padding, "
    "int[] output_padding, int[] dilation, int groups, str activation, float negative_slope, float residual_scale, "
    "float output_scale, ScalarType output_dtype) -> Tensor",
    forward=_forward,
    fake=_fake,
    batch=Batch(images=(0, 4)),
    flops=transposed_flops,
)
