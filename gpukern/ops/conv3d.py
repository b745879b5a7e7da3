"""3-D convolution: forward, input gradient and weight gradient, differentiable to any order.

As :mod:`gpukern.ops.conv2d`, which has what does not depend on the number of dimensions.
"""

from __future__ import annotations

from typing import Any

import torch

from gpukern.conv import Sides, Triple, output_sizes, volume_problem
from gpukern.ops._activation.reference import in_torch
from gpukern.ops.activation import activation as apply_activation
from gpukern.ops.activation import affine_jvp, needs_input
from gpukern.ops.conv2d import (
    GEOMETRY,
    check_residual,
    forward_flops,
    gradients,
    save_for_gradients,
    save_for_input_grad,
    save_for_weight_grad,
    transposed_flops,
    weight_grad_flops,
)
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import Operator, wants_gradient
from gpukern.runtime.tensors import as_memory_format, check_operands, memory_format_of
from gpukern.runtime.transforms import Batch, bilinear_jvp

_implementations = Implementations("gpukern.conv.volumes")

_aten = torch.ops.aten


def apply(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: Triple,
    padding: Sides,
    dilation: Triple,
    groups: int,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    """Compute ``act(x ∗ w + b + residual)`` in one kernel, or in two if a gradient will need the input of ``act``."""
    operands, geometry = (input, weight, bias, residual), (stride, padding, dilation, groups)
    if needs_input(activation) and wants_gradient(*operands):
        return apply_activation(conv3d(*operands, *geometry, "none", 0.0), activation, negative_slope)
    return conv3d(*operands, *geometry, activation, negative_slope)


# ---- forward -------------------------------------------------------------------------------------------------------


def _conv3d(
    input, weight, bias, residual, stride, padding, dilation, groups, activation, negative_slope
) -> torch.Tensor:
    check_operands("conv3d", input, weight, bias, residual)
    bias_shape = None if bias is None else bias.shape
    problem = volume_problem(input.shape, weight.shape, bias_shape, stride, padding, dilation, groups)
    if residual is not None:
        check_residual(residual, problem.shapes[2])
    return _implementations.of(input).conv3d(problem, input, weight, bias, residual, activation, negative_slope)


def _conv3d_fake(
    input, weight, bias, residual, stride, padding, dilation, groups, activation, negative_slope
) -> torch.Tensor:
    check_operands("conv3d", input, weight, bias, residual)
    bias_shape = None if bias is None else bias.shape
    sizes = output_sizes(input.shape, weight.shape, bias_shape, stride, padding, dilation, groups)
    shape = (input.shape[0], weight.shape[0], *sizes)
    if residual is not None:
        check_residual(residual, shape)
    return input.new_empty(shape).to(memory_format=memory_format_of(input, weight))


def _conv3d_backward(ctx: Any, grad: torch.Tensor) -> tuple:
    return gradients(ctx, grad, conv3d, conv3d_input_grad, conv3d_weight_grad)


def _in_torch(
    input, weight, bias, residual, stride, padding, dilation, groups, activation, negative_slope
) -> torch.Tensor:
    front, back, top, bottom, left, right = padding
    before = [front, top, left]
    if before != [back, bottom, right]:  # torch's operator pads both sides alike
        input = _aten.constant_pad_nd.default(input, [left, right, top, bottom, front, back], 0.0)
        before = [0, 0, 0]
    y = _aten.conv3d.default(input, weight, bias, stride, before, dilation, groups)
    return in_torch(y if residual is None else _aten.add.Tensor(y, residual), activation, negative_slope)


conv3d = Operator(
    "conv3d",
    f"(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, {GEOMETRY}, str activation, float negative_slope)"
    " -> Tensor",
    forward=_conv3d,
    fake=_conv3d_fake,
    save=save_for_gradients,
    backward=_conv3d_backward,
    jvp=affine_jvp,
    batch=Batch(images=(0, 3)),
    decomposition=_in_torch,
    flops=forward_flops,
)


# ---- input gradient ------------------------------------------------------------------------------------------------


def _input_grad(grad, weight, input_shape, channels_last, stride, padding, dilation, groups) -> torch.Tensor:
    problem = volume_problem(input_shape, weight.shape, None, stride, padding, dilation, groups)
    return _implementations.of(grad).conv3d_input_grad(problem, grad, weight, channels_last)


def _grad_fake(grad, other, shape, channels_last, stride, padding, dilation, groups) -> torch.Tensor:
    return grad.new_empty(shape).to(memory_format=as_memory_format(channels_last, 5))


def _input_grad_backward(ctx: Any, grad_grad: torch.Tensor) -> tuple:
    grad, weight = ctx.saved_tensors
    needs_grad, needs_weight = ctx.needs_input_grad[:2]
    return (
        conv3d(grad_grad, weight, None, None, *ctx.geometry, "none", 0.0) if needs_grad else None,
        conv3d_weight_grad(grad, grad_grad, weight.shape, ctx.weight_last, *ctx.geometry) if needs_weight else None,
        *(None,) * 6,
    )


conv3d_input_grad = Operator(
    "conv3d_input_grad",
    f"(Tensor grad, Tensor weight, SymInt[] input_shape, bool channels_last, {GEOMETRY}) -> Tensor",
    forward=_input_grad,
    fake=_grad_fake,
    save=save_for_input_grad,
    backward=_input_grad_backward,
    jvp=bilinear_jvp,
    batch=Batch(images=(0,), sizes=2),
    flops=transposed_flops,
)


# ---- weight gradient -----------------------------------------------------------------------------------------------


def _weight_grad(grad, input, weight_shape, channels_last, stride, padding, dilation, groups) -> torch.Tensor:
    problem = volume_problem(input.shape, weight_shape, None, stride, padding, dilation, groups)
    return _implementations.of(grad).conv3d_weight_grad(problem, grad, input, channels_last)


def _weight_grad_backward(ctx: Any, grad_grad: torch.Tensor) -> tuple:
    grad, input = ctx.saved_tensors
    needs_grad, needs_input_grad = ctx.needs_input_grad[:2]
    return (
        conv3d(input, grad_grad, None, None, *ctx.geometry, "none", 0.0) if needs_grad else None,
        conv3d_input_grad(grad, grad_grad, input.shape, ctx.input_last, *ctx.geometry) if needs_input_grad else None,
        *(None,) * 6,
    )


conv3d_weight_grad = Operator(
    "conv3d_weight_grad",
    f"(Tensor grad, Tensor input, SymInt[] weight_shape, bool channels_last, {GEOMETRY}) -> Tensor",
    forward=_weight_grad,
    fake=_grad_fake,
    save=save_for_weight_grad,
    backward=_weight_grad_backward,
    jvp=bilinear_jvp,
    flops=weight_grad_flops,
)
