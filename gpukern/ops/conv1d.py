"""1-D convolution, differentiable to any order: that of images of one row, on the kernels of :mod:`gpukern.ops.conv2d`.

An operator of its own, so that graphs, exports and errors have torch's name and the user's shapes.
"""

from __future__ import annotations

from typing import Any

import torch

from gpukern.conv import Pair, of_rows, output_sizes, sequence_problem
from gpukern.ops import conv2d as _conv2d
from gpukern.ops._activation.reference import in_torch
from gpukern.ops._sequences import Rows, fresh_sequence, rows, sequence, without_layout
from gpukern.ops.activation import activation as apply_activation
from gpukern.ops.activation import affine_jvp, needs_input
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import Operator, wants_gradient
from gpukern.runtime.strides import dense_strides
from gpukern.runtime.tensors import check_operands, memory_format_of
from gpukern.runtime.transforms import Batch

_implementations = Implementations("gpukern.conv")

_aten = torch.ops.aten


def apply(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: tuple[int],
    padding: Pair,
    dilation: tuple[int],
    groups: int,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    """Compute ``act(x ∗ w + b + residual)`` in one kernel, or in two if a gradient will need the input of ``act``."""
    operands, geometry = (input, weight, bias, residual), (stride, padding, dilation, groups)
    if needs_input(activation) and wants_gradient(*operands):
        return apply_activation(conv1d(*operands, *geometry, "none", 0.0), activation, negative_slope)
    return conv1d(*operands, *geometry, activation, negative_slope)


def _forward(
    input, weight, bias, residual, stride, padding, dilation, groups, activation, negative_slope
) -> torch.Tensor:
    check_operands("conv1d", input, weight, bias, residual)
    bias_shape = None if bias is None else bias.shape
    problem = sequence_problem(input.shape, weight.shape, bias_shape, stride, padding, dilation, groups)
    if residual is not None:
        _conv2d.check_residual(residual, (problem.N, problem.K, problem.Q))
        residual = rows(residual)
    operands = without_layout(input), rows(weight), bias, residual
    return fresh_sequence(_implementations.of(input).conv2d(problem, *operands, activation, negative_slope))


def _fake(input, weight, bias, residual, stride, padding, dilation, groups, activation, negative_slope) -> torch.Tensor:
    check_operands("conv1d", input, weight, bias, residual)
    bias_shape = None if bias is None else bias.shape
    sizes = output_sizes(input.shape, weight.shape, bias_shape, stride, padding, dilation, groups)
    shape = (input.shape[0], weight.shape[0], *sizes)
    if residual is not None:
        _conv2d.check_residual(residual, shape)
    return fresh_sequence(input.new_empty(of_rows(shape)).to(memory_format=memory_format_of(rows(weight))))


def _save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    _conv2d.save_for_gradients(ctx, arguments, output)
    of_input, of_weight, (stride, padding, dilation, groups), epilogue = ctx.state
    # Both gradients are in the weight's layout, as torch's.
    last = memory_format_of(rows(arguments[1])) is torch.channels_last
    ctx.state = (
        *(each and _laid_out(of_rows(each[0]), last) for each in (of_input, of_weight)),
        (of_rows(stride), (0, 0, *padding), of_rows(dilation), groups),
        epilogue,
    )


def _laid_out(shape: tuple[int, ...], channels_last: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return shape, dense_strides(shape, channels_last)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple:
    by = _conv2d.conv2d, _conv2d.conv2d_input_grad, _conv2d.conv2d_weight_grad
    grads = _conv2d.gradients(Rows(ctx), rows(grad), *by)
    return tuple(each if each is None or each.dim() != 4 else sequence(each) for each in grads)


def _in_torch(
    input, weight, bias, residual, stride, padding, dilation, groups, activation, negative_slope
) -> torch.Tensor:
    before, after = padding
    if before != after:  # torch's operator pads both sides alike
        input, before = _aten.constant_pad_nd.default(input, [before, after], 0.0), 0
    y = _aten.conv1d.default(input, weight, bias, stride, [before], dilation, groups)
    return in_torch(y if residual is None else _aten.add.Tensor(y, residual), activation, negative_slope)


conv1d = Operator(
    "conv1d",
    f"(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, {_conv2d.GEOMETRY}, str activation, "
    "float negative_slope) -> Tensor",
    forward=_forward,
    fake=_fake,
    save=_save,
    backward=_backward,
    jvp=affine_jvp,
    batch=Batch(images=(0, 3)),
    decomposition=_in_torch,
    flops=_conv2d.forward_flops,
)
