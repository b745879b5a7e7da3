"""The fully-connected layer, a 1×1 convolution over images of one pixel, on the convolution's kernels.

Differentiable to any order: the input gradient is again a linear layer, with the transposed weight.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from gpukern.ops._activation.reference import in_torch
from gpukern.ops.activation import activation as apply_activation
from gpukern.ops.activation import activation_grad, affine_jvp, needs_input
from gpukern.ops.conv2d import channel_sum
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import Operator, wants_gradient
from gpukern.runtime.tensors import check_operands
from gpukern.runtime.transforms import Batch, bilinear_jvp

_implementations = Implementations("gpukern.ops._linear")


def apply(input, weight, bias, activation: str, negative_slope: float) -> torch.Tensor:
    """``act(x Wᵀ + b)`` for ``input`` [*, C] and ``weight`` [K, C] or [C]; flattens the leading dimensions."""
    if input.dim() < 1 or weight.dim() not in (1, 2):
        raise RuntimeError(
            f"linear: expected input [*, in_features] and weight [out_features, in_features], "
            f"got {list(input.shape)} and {list(weight.shape)}"
        )
    if weight.dim() == 1:
        bias = None if bias is None else bias.reshape(1)
        return apply(input, weight.unsqueeze(0), bias, activation, negative_slope).squeeze(-1)
    if needs_input(activation) and wants_gradient(input, weight, bias):
        return apply_activation(apply(input, weight, bias, "none", 0.0), activation, negative_slope)
    if input.dim() == 2:
        return linear(input, weight, bias, activation, negative_slope)
    *leading, features = input.shape
    # For rows without features, reshape cannot infer their number.
    rows = input.reshape(-1 if features else math.prod(leading), features)
    return linear(rows, weight, bias, activation, negative_slope).reshape(*leading, weight.shape[0])


def _check(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    check_operands("linear", input, weight, bias)
    rows, columns = input.shape, weight.shape
    if rows[1] != columns[1]:
        raise RuntimeError(
            f"linear: input and weight shapes cannot be multiplied ({rows[0]}x{rows[1]} and {columns[1]}x{columns[0]})"
        )
    if bias is not None and tuple(bias.shape) not in ((columns[0],), (1,)):
        raise RuntimeError(f"linear: expected bias of shape [{columns[0]}], got {list(bias.shape)}")


def _linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str, negative_slope: float
) -> torch.Tensor:
    _check(input, weight, bias)
    return _implementations.of(input).linear(input, weight, bias, activation, negative_slope)


def _linear_fake(input, weight, bias, activation, negative_slope) -> torch.Tensor:
    _check(input, weight, bias)
    return input.new_empty((input.shape[0], weight.shape[0]))


def _linear_save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    input, weight, bias, activation, negative_slope = arguments
    again = needs_input(activation)
    needs_input_grad, needs_weight_grad = ctx.needs_input_grad[:2]
    ctx.save_for_backward(
        input if needs_weight_grad or again else None,
        weight if needs_input_grad or again else None,
        None if activation == "none" or again else output,
        *((bias,) if again else ()),
    )
    ctx.epilogue = activation, negative_slope


def _linear_backward(ctx: Any, grad: torch.Tensor) -> tuple:
    input, weight, output, *others = ctx.saved_tensors
    needs_input_grad, needs_weight_grad, needs_bias = ctx.needs_input_grad[:3]
    if others:
        # The activation's gradient needs its input, which forward did not save: recompute it, see :func:`apply`.
        output = linear(input, weight, *others, "none", 0.0)
    if output is not None:
        grad = activation_grad(grad, output, *ctx.epilogue)
    return (
        linear(grad, weight.t(), None, "none", 0.0) if needs_input_grad else None,
        linear_weight_grad(grad, input) if needs_weight_grad else None,
        channel_sum(grad[:, :, None, None]) if needs_bias else None,
        None,
        None,
    )


def _in_torch(input, weight, bias, activation, negative_slope) -> torch.Tensor:
    return in_torch(torch.ops.aten.linear.default(input, weight, bias), activation, negative_slope)


def _flops(of_conv, input, weight, *_, **__) -> int:
    return 2 * input[0] * weight[0] * weight[1]


linear = Operator(
    "linear",
    "(Tensor input, Tensor weight, Tensor? bias, str activation, float negative_slope) -> Tensor",
    forward=_linear,
    fake=_linear_fake,
    save=_linear_save,
    backward=_linear_backward,
    jvp=affine_jvp,
    batch=Batch(images=(0,)),
    decomposition=_in_torch,
    flops=_flops,
)


def _weight_grad(grad: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    return _implementations.of(grad).linear_weight_grad(grad, input)


def _weight_grad_fake(grad: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    return grad.new_empty((grad.shape[1], input.shape[1]))


def _weight_grad_save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(*arguments)


def _weight_grad_backward(ctx: Any, grad_grad: torch.Tensor) -> tuple:
    grad, input = ctx.saved_tensors
    needs_grad, needs_input = ctx.needs_input_grad[:2]
    return (
        linear(input, grad_grad, None, "none", 0.0) if needs_grad else None,
        linear(grad, grad_grad.t(), None, "none", 0.0) if needs_input else None,
    )


def _weight_grad_flops(of_conv, grad, input, **_) -> int:
    return 2 * grad[0] * grad[1] * input[1]


linear_weight_grad = Operator(
    "linear_weight_grad",
    "(Tensor grad, Tensor input) -> Tensor",
    forward=_weight_grad,
    fake=_weight_grad_fake,
    save=_weight_grad_save,
    backward=_weight_grad_backward,
    jvp=bilinear_jvp,
    flops=_weight_grad_flops,
)
