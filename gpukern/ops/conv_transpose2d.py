"""2-D transposed convolution: the convolution's input gradient as a separate operation, on the same kernels.

Differentiable to any order: its input gradient is a convolution, its weight gradient that of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gpukern.conv import ConvProblem, Pair, transposed_problem, transposed_size
from gpukern.ops._activation.reference import in_torch
from gpukern.ops.activation import activation as apply_activation
from gpukern.ops.activation import activation_grad, affine_jvp, needs_input
from gpukern.ops.conv2d import channel_sum, check_residual, conv2d, conv2d_weight_grad, transposed_flops
from gpukern.runtime.integers import require
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import Operator, wants_gradient
from gpukern.runtime.strides import is_channels_last
from gpukern.runtime.tensors import check_operands, memory_format_of
from gpukern.runtime.transforms import Batch

_implementations = Implementations("gpukern.conv")


def apply(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: Pair,
    padding: Pair,
    output_padding: Pair,
    dilation: Pair,
    groups: int,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    """Compute ``act(x ∗ᵀ w + b + residual)`` in one kernel, or in two for a gradient through an activation."""
    operands, geometry = (input, weight, bias, residual), (stride, padding, output_padding, dilation, groups)
    return transposed(conv_transpose2d, operands, geometry, activation, negative_slope)


def transposed(operator: Operator, operands: tuple, geometry: tuple, activation: str, negative_slope: float):
    """Do as :func:`apply`, with the ``operator`` of as many dimensions as the strides have."""
    stride, padding, output_padding, dilation, groups = geometry
    check_output_padding(stride, output_padding, dilation)
    more = [extra // step for extra, step in zip(output_padding, stride, strict=True)]
    if any(more):
        # Extra rows that a dilation above the stride allows: equivalent to more input rows, of zeros.
        ends = [size for extra in reversed(more) for size in (0, extra)]
        operands = torch.nn.functional.pad(operands[0], ends), *operands[1:]
        output_padding = tuple(extra % step for extra, step in zip(output_padding, stride, strict=True))
    geometry = stride, padding, output_padding, dilation, groups
    if activation != "none" and wants_gradient(*operands):
        inner = operator(*operands, *geometry, "none", 0.0)
        return apply_activation(inner, activation, negative_slope)
    return operator(*operands, *geometry, activation, negative_slope)


def check_output_padding(stride: Sequence[int], output_padding: Sequence[int], dilation: Sequence[int]) -> None:
    """Check torch's rule: output padding is below the stride or the dilation."""
    require(min(stride) > 0, f"non-positive stride is not supported: {stride}")
    require(
        all(e >= 0 and (e < s or e < d) for e, s, d in zip(output_padding, stride, dilation, strict=True)),
        f"output padding must be smaller than either stride or dilation, but got output_padding {output_padding}, "
        f"stride {stride}, dilation {dilation}",
    )


def _problem(input, weight, bias, residual, *geometry) -> ConvProblem:
    check_operands("conv_transpose2d", input, weight, bias, residual)
    problem = transposed_problem(input.shape, weight.shape, None if bias is None else bias.shape, *geometry)
    if residual is not None:
        check_residual(residual, (problem.N, problem.C, problem.H, problem.W))
    return problem


def _forward(
    input, weight, bias, residual, stride, padding, output_padding, dilation, groups, activation, negative_slope
) -> torch.Tensor:
    problem = _problem(input, weight, bias, residual, stride, padding, output_padding, dilation, groups)
    launch = _implementations.of(input).conv_transpose2d
    return launch(problem, input, weight, bias, residual, activation, negative_slope)


def _fake(
    input, weight, bias, residual, stride, padding, output_padding, dilation, groups, activation, negative_slope
) -> torch.Tensor:
    bias_shape = None if bias is None else bias.shape
    H, W = transposed_size(input.shape, weight.shape, bias_shape, stride, padding, output_padding, dilation, groups)
    shape = (input.shape[0], weight.shape[1] * groups, H, W)
    if residual is not None:
        check_residual(residual, shape)
    return input.new_empty(shape).to(memory_format=memory_format_of(input, weight))


def save_operands(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    input, weight, bias, residual, *ctx.geometry, activation, negative_slope = arguments
    ctx.epilogue = activation, negative_slope
    others = (bias, residual) if activation != "none" else ()
    ctx.save_for_backward(input, weight, *others)
    ctx.weight_last = is_channels_last(weight.shape, weight.stride())


def _backward(ctx: Any, grad: torch.Tensor) -> tuple:
    return transposed_gradients(ctx, grad, conv_transpose2d, conv2d, conv2d_weight_grad)


def transposed_gradients(
    ctx: Any, grad: torch.Tensor, operator: Operator, conv: Operator, weight_grad: Operator
) -> tuple:
    """Return the gradients of ``operator`` by the convolution ``conv`` and its weight gradient."""
    input, weight, *others = ctx.saved_tensors
    if others:
        # Reached only by a graph captured for inference, see :func:`apply`: recompute the activation's input.
        saved = operator(input, weight, *others, *ctx.geometry, "none", 0.0)
        if not needs_input(ctx.epilogue[0]):
            saved = apply_activation(saved, *ctx.epilogue)
        grad = activation_grad(grad, saved, *ctx.epilogue)
    stride, padding, _, dilation, groups = ctx.geometry
    geometry = stride, tuple(pad for pad in padding for _ in range(2)), dilation, groups
    needs_input_grad, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    return (
        conv(grad, weight, None, None, *geometry, "none", 0.0) if needs_input_grad else None,
        weight_grad(input, grad, weight.shape, ctx.weight_last, *geometry) if needs_weight else None,
        channel_sum(grad) if needs_bias else None,
        grad if needs_residual else None,
        *(None,) * 7,
    )


def _in_torch(
    input, weight, bias, residual, stride, padding, output_padding, dilation, groups, activation, negative_slope
) -> torch.Tensor:
    geometry = stride, padding, output_padding, groups, dilation
    y = torch.ops.aten.conv_transpose2d.input(input, weight, bias, *geometry)
    return in_torch(y if residual is None else torch.ops.aten.add.Tensor(y, residual), activation, negative_slope)


#: ``output_padding`` below the stride.
conv_transpose2d = Operator(
    "conv_transpose2d",
    "(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding, int[] output_padding, "
    "int[] dilation, int groups, str activation, float negative_slope) -> Tensor",
    forward=_forward,
    fake=_fake,
    save=save_operands,
    backward=_backward,
    jvp=affine_jvp,
    batch=Batch(images=(0, 3)),
    decomposition=_in_torch,
    flops=transposed_flops,
)
