"""1-D transposed convolution: :mod:`gpukern.ops.conv_transpose2d` of images of one row."""

from __future__ import annotations

from typing import Any

import torch

from gpukern.conv import of_rows, transposed_sequence_problem, transposed_sizes
from gpukern.ops import conv_transpose2d as _conv_transpose2d
from gpukern.ops._activation.reference import in_torch
from gpukern.ops._sequences import Rows, fresh_sequence, rows, sequence, without_layout
from gpukern.ops.activation import affine_jvp
from gpukern.ops.conv2d import check_residual, conv2d, conv2d_weight_grad, transposed_flops
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import Operator
from gpukern.runtime.tensors import check_operands, memory_format_of
from gpukern.runtime.transforms import Batch

_implementations = Implementations("gpukern.conv")


def _forward(
    input, weight, bias, residual, stride, padding, output_padding, dilation, groups, activation, negative_slope
) -> torch.Tensor:
    check_operands("conv_transpose1d", input, weight, bias, residual)
    geometry = stride, padding, output_padding, dilation, groups
    problem = transposed_sequence_problem(input.shape, weight.shape, None if bias is None else bias.shape, *geometry)
    if residual is not None:
        check_residual(residual, (problem.N, problem.C, problem.W))
        residual = rows(residual)
    operands = without_layout(input), rows(weight), bias, residual
    return fresh_sequence(_implementations.of(input).conv_transpose2d(problem, *operands, activation, negative_slope))


def _fake(
    input, weight, bias, residual, stride, padding, output_padding, dilation, groups, activation, negative_slope
) -> torch.Tensor:
    check_operands("conv_transpose1d", input, weight, bias, residual)
    bias_shape = None if bias is None else bias.shape
    sizes = transposed_sizes(input.shape, weight.shape, bias_shape, stride, padding, output_padding, dilation, groups)
    shape = (input.shape[0], weight.shape[1] * groups, *sizes)
    if residual is not None:
        check_residual(residual, shape)
    return fresh_sequence(input.new_empty(of_rows(shape)).to(memory_format=memory_format_of(rows(weight))))


def _save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    _conv_transpose2d.save_operands(ctx, arguments, output)
    stride, padding, output_padding, dilation, groups = ctx.geometry
    ctx.geometry = of_rows(stride), of_rows(padding, 0), of_rows(output_padding, 0), of_rows(dilation), groups


def _backward(ctx: Any, grad: torch.Tensor) -> tuple:
    by = _conv_transpose2d.conv_transpose2d, conv2d, conv2d_weight_grad
    grads = _conv_transpose2d.transposed_gradients(Rows(ctx), rows(grad), *by)
    return tuple(each if each is None or each.dim() != 4 else sequence(each) for each in grads)


def _in_torch(
    input, weight, bias, residual, stride, padding, output_padding, dilation, groups, activation, negative_slope
) -> torch.Tensor:
    geometry = stride, padding, output_padding, groups, dilation
    y = torch.ops.aten.conv_transpose1d.default(input, weight, bias, *geometry)
    return in_torch(y if residual is None else torch.ops.aten.add.Tensor(y, residual), activation, negative_slope)


#: ``output_padding`` below the stride.
conv_transpose1d = Operator(
    "conv_transpose1d",
    "(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding, int[] output_padding, "
    "int[] dilation, int groups, str activation, float negative_slope) -> Tensor",
    forward=_forward,
    fake=_fake,
    save=_save,
    backward=_backward,
    jvp=affine_jvp,
    batch=Batch(images=(0, 3)),
    decomposition=_in_torch,
    flops=transposed_flops,
)
