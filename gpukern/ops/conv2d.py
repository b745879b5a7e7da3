"""2-D convolution: forward, input gradient, weight gradient and bias gradient, differentiable to any order.

With ``y = x ∗ w + b`` every gradient is linear in each of its two operands, so the three products differentiate into
one another: the input gradient of the input gradient is a convolution again, and so on.
"""

from __future__ import annotations

from typing import Any

import torch

from gpukern.ops._conv2d.problem import Padding, Pair, conv_problem, output_size
from gpukern.ops.activation import activation_grad
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import Operator
from gpukern.runtime.tensors import as_memory_format, check_alike, memory_format_of

_implementations = Implementations("gpukern.ops._conv2d")

_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"


# ---- forward -------------------------------------------------------------------------------------------------------


def _conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    check_alike("conv2d", input, weight, bias)
    bias_shape = None if bias is None else bias.shape
    problem = conv_problem(input.shape, weight.shape, bias_shape, stride, padding, dilation, groups)
    return _implementations.of(input).conv2d(problem, input, weight, bias, activation, negative_slope)


def _conv2d_fake(input, weight, bias, stride, padding, dilation, groups, activation, negative_slope) -> torch.Tensor:
    check_alike("conv2d", input, weight, bias)
    bias_shape = None if bias is None else bias.shape
    P, Q = output_size(input.shape, weight.shape, bias_shape, stride, padding, dilation, groups)
    shape = (input.shape[0], weight.shape[0], P, Q)
    return input.new_empty(shape).to(memory_format=memory_format_of(input, weight))


def _conv2d_save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    input, weight, _, stride, padding, dilation, groups, activation, negative_slope = arguments
    needs_input, needs_weight, _ = ctx.needs_input_grad[:3]
    ctx.save_for_backward(
        input if needs_weight else None,
        weight if needs_input else None,
        None if activation == "none" else output,
    )
    # One attribute: each costs a tenth of a microsecond, and the forward of a small layer is all host time.
    ctx.state = (
        _layout(input) if needs_input else None,
        _layout(weight) if needs_weight else None,
        (stride, padding, dilation, groups),
        (activation, negative_slope),
    )


def _layout(tensor: torch.Tensor) -> tuple[torch.Size, bool]:
    """The shape, and whether the layout is channels_last: what a gradient must look like."""
    return tensor.shape, memory_format_of(tensor) is torch.channels_last


def _conv2d_backward(ctx: Any, grad: torch.Tensor) -> tuple:
    input, weight, output = ctx.saved_tensors
    needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    input_layout, weight_layout, geometry, epilogue = ctx.state
    if output is not None:
        grad = activation_grad(grad, output, *epilogue)
    return (
        conv2d_input_grad(grad, weight, *input_layout, *geometry) if needs_input else None,
        conv2d_weight_grad(grad, input, *weight_layout, *geometry) if needs_weight else None,
        channel_sum(grad) if needs_bias else None,
        *(None,) * 6,
    )


conv2d = Operator(
    "conv2d",
    f"(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}, str activation, float negative_slope) -> Tensor",
    forward=_conv2d,
    fake=_conv2d_fake,
    save=_conv2d_save,
    backward=_conv2d_backward,
)


# ---- input gradient ------------------------------------------------------------------------------------------------


def _input_grad(grad, weight, input_shape, channels_last, stride, padding, dilation, groups) -> torch.Tensor:
    problem = conv_problem(input_shape, weight.shape, None, stride, padding, dilation, groups)
    return _implementations.of(grad).conv2d_input_grad(problem, grad, weight, channels_last)


def _input_grad_fake(grad, weight, input_shape, channels_last, stride, padding, dilation, groups) -> torch.Tensor:
    return grad.new_empty(input_shape).to(memory_format=as_memory_format(channels_last))


def _input_grad_save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    grad, weight, _, _, *ctx.geometry = arguments
    ctx.save_for_backward(grad, weight)
    ctx.weight_last = memory_format_of(weight) is torch.channels_last


def _input_grad_backward(ctx: Any, grad_grad: torch.Tensor) -> tuple:
    grad, weight = ctx.saved_tensors
    needs_grad, needs_weight = ctx.needs_input_grad[:2]
    return (
        conv2d(grad_grad, weight, None, *ctx.geometry, "none", 0.0) if needs_grad else None,
        conv2d_weight_grad(grad, grad_grad, weight.shape, ctx.weight_last, *ctx.geometry) if needs_weight else None,
        *(None,) * 6,
    )


conv2d_input_grad = Operator(
    "conv2d_input_grad",
    f"(Tensor grad, Tensor weight, SymInt[] input_shape, bool channels_last, {_GEOMETRY}) -> Tensor",
    forward=_input_grad,
    fake=_input_grad_fake,
    save=_input_grad_save,
    backward=_input_grad_backward,
)


# ---- weight gradient -----------------------------------------------------------------------------------------------


def _weight_grad(grad, input, weight_shape, channels_last, stride, padding, dilation, groups) -> torch.Tensor:
    problem = conv_problem(input.shape, weight_shape, None, stride, padding, dilation, groups)
    return _implementations.of(grad).conv2d_weight_grad(problem, grad, input, channels_last)


def _weight_grad_fake(grad, input, weight_shape, channels_last, stride, padding, dilation, groups) -> torch.Tensor:
    return grad.new_empty(weight_shape).to(memory_format=as_memory_format(channels_last))


def _weight_grad_save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    grad, input, _, _, *ctx.geometry = arguments
    ctx.save_for_backward(grad, input)
    ctx.input_last = memory_format_of(input) is torch.channels_last


def _weight_grad_backward(ctx: Any, grad_grad: torch.Tensor) -> tuple:
    grad, input = ctx.saved_tensors
    needs_grad, needs_input = ctx.needs_input_grad[:2]
    return (
        conv2d(input, grad_grad, None, *ctx.geometry, "none", 0.0) if needs_grad else None,
        conv2d_input_grad(grad, grad_grad, input.shape, ctx.input_last, *ctx.geometry) if needs_input else None,
        *(None,) * 6,
    )


conv2d_weight_grad = Operator(
    "conv2d_weight_grad",
    f"(Tensor grad, Tensor input, SymInt[] weight_shape, bool channels_last, {_GEOMETRY}) -> Tensor",
    forward=_weight_grad,
    fake=_weight_grad_fake,
    save=_weight_grad_save,
    backward=_weight_grad_backward,
)


# ---- bias gradient -------------------------------------------------------------------------------------------------


def _channel_sum(grad: torch.Tensor) -> torch.Tensor:
    return _implementations.of(grad).channel_sum(grad)


def _channel_sum_fake(grad: torch.Tensor) -> torch.Tensor:
    return grad.new_empty(grad.shape[1])


def _channel_sum_save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    ctx.shape = arguments[0].shape


def _channel_sum_backward(ctx: Any, grad_grad: torch.Tensor) -> torch.Tensor:
    return grad_grad[:, None, None].expand(ctx.shape)


channel_sum = Operator(
    "channel_sum",
    "(Tensor grad) -> Tensor",
    forward=_channel_sum,
    fake=_channel_sum_fake,
    save=_channel_sum_save,
    backward=_channel_sum_backward,
)
