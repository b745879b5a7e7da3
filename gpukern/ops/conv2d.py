"""2-D convolution: forward, input gradient, weight gradient and bias gradient, differentiable to any order.

With ``y = x ∗ w + b`` every gradient is linear in each of its two operands, so the three products differentiate into
one another: the input gradient of the input gradient is a convolution again, and so on.
"""

from __future__ import annotations

from typing import Any

import torch

from gpukern.conv import Padding, Pair, conv_problem, output_size
from gpukern.ops._activation.reference import in_torch
from gpukern.ops.activation import activation as apply_activation
from gpukern.ops.activation import activation_grad, activation_grad_jvp, affine_jvp, needs_input
from gpukern.runtime.eight_bits import Checked
from gpukern.runtime.integers import require
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import Operator, wants_gradient
from gpukern.runtime.strides import is_channels_last
from gpukern.runtime.tensors import as_memory_format, check_operands, memory_format_of
from gpukern.runtime.transforms import Batch, bilinear_jvp, linear_jvp

_implementations = Implementations("gpukern.conv")
_reductions = Implementations("gpukern.ops._reduction")

_aten = torch.ops.aten
GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"


def apply(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    """Compute ``act(x ∗ w + b + residual)`` in one kernel, or in two if a gradient will need the input of ``act``."""
    if needs_input(activation) and wants_gradient(input, weight, bias, residual):
        inner = conv2d(input, weight, bias, residual, stride, padding, dilation, groups, "none", 0.0)
        return apply_activation(inner, activation, negative_slope)
    return conv2d(input, weight, bias, residual, stride, padding, dilation, groups, activation, negative_slope)


# ---- forward -------------------------------------------------------------------------------------------------------


def check_residual(residual: Checked, shape: tuple) -> None:
    """Raise RuntimeError unless ``residual`` has the output's shape: it is not broadcast."""
    require(
        tuple(residual.shape) == shape,
        f"expected residual to have the output's shape {list(shape)}, but got {list(residual.shape)}",
    )


def _conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    # Every name in full and no *arguments: packing and unpacking ten takes as long as all checks here.
    check_operands("conv2d", input, weight, bias, residual)
    bias_shape = None if bias is None else bias.shape
    problem = conv_problem(input.shape, weight.shape, bias_shape, stride, padding, dilation, groups)
    if residual is not None:
        check_residual(residual, (problem.N, problem.K, problem.P, problem.Q))
    return _implementations.of(input).conv2d(problem, input, weight, bias, residual, activation, negative_slope)


def _conv2d_fake(
    input, weight, bias, residual, stride, padding, dilation, groups, activation, negative_slope
) -> torch.Tensor:
    check_operands("conv2d", input, weight, bias, residual)
    bias_shape = None if bias is None else bias.shape
    P, Q = output_size(input.shape, weight.shape, bias_shape, stride, padding, dilation, groups)
    shape = (input.shape[0], weight.shape[0], P, Q)
    if residual is not None:
        check_residual(residual, shape)
    return input.new_empty(shape).to(memory_format=memory_format_of(input, weight))


def save_for_gradients(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    input, weight, bias, residual, stride, padding, dilation, groups, activation, negative_slope = arguments
    again = needs_input(activation)
    needs_input_grad, needs_weight_grad = ctx.needs_input_grad[:2]
    ctx.save_for_backward(
        input if needs_weight_grad or again else None,
        weight if needs_input_grad or again else None,
        None if activation == "none" or again else output,
        *((bias, residual) if again else ()),
    )
    # One attribute: each costs a tenth of a microsecond, and the forward of a small layer is all host time.
    ctx.state = (
        (input.shape, input.stride()) if needs_input_grad else None,
        (weight.shape, weight.stride()) if needs_weight_grad else None,
        (stride, padding, dilation, groups),
        (activation, negative_slope),
    )


def _conv2d_backward(ctx: Any, grad: torch.Tensor) -> tuple:
    return gradients(ctx, grad, conv2d, conv2d_input_grad, conv2d_weight_grad)


def gradients(ctx: Any, grad: torch.Tensor, conv: Operator, input_grad: Operator, weight_grad: Operator) -> tuple:
    """Return the gradients of :data:`conv2d`, or of another ``conv`` of the same arguments, by its two operators."""
    input, weight, output, *others = ctx.saved_tensors
    needs_input_grad, needs_weight_grad, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    of_input, of_weight, geometry, epilogue = ctx.state
    if others:
        # The activation's gradient needs its input, which forward did not save: recompute it, see :func:`apply`.
        output = conv(input, weight, *others, *geometry, "none", 0.0)
    grad_bias = None
    if output is not None and needs_bias and not torch.is_grad_enabled():
        # Only if no derivative of the gradient is requested.
        grad, grad_bias = activation_grad_sum(grad, output, *epilogue)
    elif output is not None:
        grad = activation_grad(grad, output, *epilogue)
    if needs_bias and grad_bias is None:
        grad_bias = channel_sum(grad)
    return (
        input_grad(grad, weight, *_shape_and_layout(*of_input), *geometry) if needs_input_grad else None,
        weight_grad(grad, input, *_shape_and_layout(*of_weight), *geometry) if needs_weight_grad else None,
        grad_bias,
        grad if needs_residual else None,
        *(None,) * 6,
    )


def _shape_and_layout(shape: torch.Size, strides: tuple[int, ...]) -> tuple[torch.Size, bool]:
    """Return a gradient's required shape, and whether its layout is channels_last."""
    return shape, is_channels_last(shape, strides)


def _in_torch(
    input, weight, bias, residual, stride, padding, dilation, groups, activation, negative_slope
) -> torch.Tensor:
    top, bottom, left, right = padding
    if (top, left) != (bottom, right):  # torch's operator pads both sides alike
        input, top, left = _aten.constant_pad_nd.default(input, [left, right, top, bottom], 0.0), 0, 0
    y = _aten.conv2d.default(input, weight, bias, stride, [top, left], dilation, groups)
    return in_torch(y if residual is None else _aten.add.Tensor(y, residual), activation, negative_slope)


def forward_flops(of_conv, input, weight, *_, out_shape, **__) -> int:
    return of_conv(input, weight, out_shape)


conv2d = Operator(
    "conv2d",
    f"(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, {GEOMETRY}, str activation, float negative_slope)"
    " -> Tensor",
    forward=_conv2d,
    fake=_conv2d_fake,
    save=save_for_gradients,
    backward=_conv2d_backward,
    jvp=affine_jvp,
    batch=Batch(images=(0, 3)),
    decomposition=_in_torch,
    flops=forward_flops,
)


# ---- forward, with statistics of the output ------------------------------------------------------------------------


def _statistics(
    input, weight, bias, stride, padding, dilation, groups
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_operands("conv2d", input, weight, bias)
    bias_shape = None if bias is None else bias.shape
    problem = conv_problem(input.shape, weight.shape, bias_shape, stride, padding, dilation, groups)
    return _implementations.of(input).conv2d_statistics(problem, input, weight, bias)


def _statistics_fake(
    input, weight, bias, stride, padding, dilation, groups
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    output = _conv2d_fake(input, weight, bias, None, stride, padding, dilation, groups, "none", 0.0)
    total = torch.promote_types(output.dtype, torch.float32)
    K = output.shape[1]
    return output, output.new_empty(K, dtype=total), output.new_empty(K, dtype=total)


def first_output_flops(of_conv, input, weight, *_, out_shape, **__) -> int:
    """FLOPs of the convolution in an operator that computes more."""
    return of_conv(input, weight, out_shape[0])


#: ``y = x ∗ w + b`` with ``Σ y`` and ``Σ (y − mean)²`` of each channel, in fp32 of the rounded y, for a batch norm that
#: follows in training: it need not read y for them. The deviations are from the mean, so that a large one costs no
#: digits. Not differentiable by itself: the batch norm's backward has the derivatives of both.
conv2d_statistics = Operator(
    "conv2d_statistics",
    f"(Tensor input, Tensor weight, Tensor? bias, {GEOMETRY}) -> (Tensor, Tensor, Tensor)",
    forward=_statistics,
    fake=_statistics_fake,
    flops=first_output_flops,
)


# ---- input gradient ------------------------------------------------------------------------------------------------


def _input_grad(grad, weight, input_shape, channels_last, stride, padding, dilation, groups) -> torch.Tensor:
    problem = conv_problem(input_shape, weight.shape, None, stride, padding, dilation, groups)
    return _implementations.of(grad).conv2d_input_grad(problem, grad, weight, channels_last)


def _input_grad_fake(grad, weight, input_shape, channels_last, stride, padding, dilation, groups) -> torch.Tensor:
    return grad.new_empty(input_shape).to(memory_format=as_memory_format(channels_last))


def save_for_input_grad(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    grad, weight, _, _, *ctx.geometry = arguments
    ctx.save_for_backward(grad, weight)
    ctx.weight_last = is_channels_last(weight.shape, weight.stride())


def _input_grad_backward(ctx: Any, grad_grad: torch.Tensor) -> tuple:
    grad, weight = ctx.saved_tensors
    needs_grad, needs_weight = ctx.needs_input_grad[:2]
    return (
        conv2d(grad_grad, weight, None, None, *ctx.geometry, "none", 0.0) if needs_grad else None,
        conv2d_weight_grad(grad, grad_grad, weight.shape, ctx.weight_last, *ctx.geometry) if needs_weight else None,
        *(None,) * 6,
    )


def transposed_flops(of_conv, input, weight, *_, out_shape, **__) -> int:
    return of_conv(input, weight, out_shape, transposed=True)


conv2d_input_grad = Operator(
    "conv2d_input_grad",
    f"(Tensor grad, Tensor weight, SymInt[] input_shape, bool channels_last, {GEOMETRY}) -> Tensor",
    forward=_input_grad,
    fake=_input_grad_fake,
    save=save_for_input_grad,
    backward=_input_grad_backward,
    jvp=bilinear_jvp,
    batch=Batch(images=(0,), sizes=2),
    flops=transposed_flops,
)


# ---- weight gradient -----------------------------------------------------------------------------------------------


def _weight_grad(grad, input, weight_shape, channels_last, stride, padding, dilation, groups) -> torch.Tensor:
    problem = conv_problem(input.shape, weight_shape, None, stride, padding, dilation, groups)
    return _implementations.of(grad).conv2d_weight_grad(problem, grad, input, channels_last)


def _weight_grad_fake(grad, input, weight_shape, channels_last, stride, padding, dilation, groups) -> torch.Tensor:
    return grad.new_empty(weight_shape).to(memory_format=as_memory_format(channels_last))


def save_for_weight_grad(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    grad, input, _, _, *ctx.geometry = arguments
    ctx.save_for_backward(grad, input)
    ctx.input_last = is_channels_last(input.shape, input.stride())


def _weight_grad_backward(ctx: Any, grad_grad: torch.Tensor) -> tuple:
    grad, input = ctx.saved_tensors
    needs_grad, needs_input = ctx.needs_input_grad[:2]
    return (
        conv2d(input, grad_grad, None, None, *ctx.geometry, "none", 0.0) if needs_grad else None,
        conv2d_input_grad(grad, grad_grad, input.shape, ctx.input_last, *ctx.geometry) if needs_input else None,
        *(None,) * 6,
    )


def weight_grad_flops(of_conv, grad, input, *_, out_shape, **__) -> int:
    # As in torch: a convolution with images and channels exchanged, whatever the groups.
    return of_conv(*([shape[1], shape[0], *shape[2:]] for shape in (input, grad, out_shape)))


conv2d_weight_grad = Operator(
    "conv2d_weight_grad",
    f"(Tensor grad, Tensor input, SymInt[] weight_shape, bool channels_last, {GEOMETRY}) -> Tensor",
    forward=_weight_grad,
    fake=_weight_grad_fake,
    save=save_for_weight_grad,
    backward=_weight_grad_backward,
    jvp=bilinear_jvp,
    flops=weight_grad_flops,
)


# ---- bias gradient -------------------------------------------------------------------------------------------------


def _channel_sum(grad: torch.Tensor) -> torch.Tensor:
    return _reductions.of(grad).channel_sum(grad)


def _channel_sum_fake(grad: torch.Tensor) -> torch.Tensor:
    return grad.new_empty(grad.shape[1])


def _channel_sum_save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    ctx.shape = arguments[0].shape


def _channel_sum_backward(ctx: Any, grad_grad: torch.Tensor) -> torch.Tensor:
    return grad_grad.view(-1, *(1,) * (len(ctx.shape) - 2)).expand(ctx.shape)


channel_sum = Operator(
    "channel_sum",
    "(Tensor grad) -> Tensor",
    forward=_channel_sum,
    fake=_channel_sum_fake,
    save=_channel_sum_save,
    backward=_channel_sum_backward,
    jvp=linear_jvp,
)


# ---- bias gradient on the way through the activation ---------------------------------------------------------------


def _activation_grad_sum(grad, output, activation, negative_slope) -> tuple[torch.Tensor, torch.Tensor]:
    return _reductions.of(grad).activation_grad_sum(grad, output, activation, negative_slope)


def _activation_grad_sum_fake(grad, output, activation, negative_slope) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(output), grad.new_empty(grad.shape[1])


def _activation_grad_sum_jvp(operator: Operator, arguments: tuple, tangents: tuple, output: tuple) -> tuple:
    inner = activation_grad_jvp(operator, arguments, tangents, output[0])
    return inner, channel_sum(inner)


#: ``∂L/∂z`` of ``y = act(z)`` and its sum over all but the channels, ``∂L/∂b``: one pass instead of two.
activation_grad_sum = Operator(
    "activation_grad_sum",
    "(Tensor grad, Tensor output, str activation, float negative_slope) -> (Tensor, Tensor)",
    forward=_activation_grad_sum,
    fake=_activation_grad_sum_fake,
    jvp=_activation_grad_sum_jvp,
)
