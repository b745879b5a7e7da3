"""2-D transposed convolution: the convolution's input gradient as a separate operation, on the same kernels.

Differentiable to any order: its input gradient is a convolution, its weight gradient that of one.
"""

from __future__ import annotations

from typing import Any

import torch

from gpukern.conv import ConvProblem, transposed_problem, transposed_size
from gpukern.ops._activation.reference import in_torch
from gpukern.ops.activation import activation as apply_activation
from gpukern.ops.activation import activation_grad, affine_jvp, needs_input
from gpukern.ops.conv2d import channel_sum, check_residual, conv2d, conv2d_weight_grad, transposed_flops
from gpukern.runtime.integers import require
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import Operator, wants_gradient
from gpukern.runtime.tensors import check_operands, memory_format_of
from gpukern.runtime.transforms import Batch

_implementations = Implementations("gpukern.conv")


def apply(
    convolution: Operator,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    output_padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    """Compute ``act(x ∗ᵀ w + b + residual)`` in one kernel, or in two for a gradient through an activation."""
    _check_output_padding(stride, output_padding, dilation)
    more = [extra // step for extra, step in zip(output_padding, stride, strict=True)]
    if any(more):
        # Extra rows that a dilation above the stride allows: equivalent to more input rows, of zeros.
        input = torch.nn.functional.pad(input, [side for extra in reversed(more) for side in (0, extra)])
        output_padding = tuple(extra % step for extra, step in zip(output_padding, stride, strict=True))
    operands = input, weight, bias, residual
    geometry = stride, padding, output_padding, dilation, groups
    if activation != "none" and wants_gradient(*operands):
        inner = convolution(*operands, *geometry, "none", 0.0)
        return apply_activation(inner, activation, negative_slope)
    return convolution(*operands, *geometry, activation, negative_slope)


def _check_output_padding(stride: tuple[int, ...], output_padding: tuple[int, ...], dilation: tuple[int, ...]) -> None:
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


def conv_transpose2d_save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    input, weight, bias, residual, *ctx.geometry, activation, negative_slope = arguments
    ctx.epilogue = activation, negative_slope
    others = (bias, residual) if activation != "none" else ()
    ctx.save_for_backward(input, weight, *others)
    ctx.weight_last = memory_format_of(weight) is torch.channels_last


def conv_transpose2d_backward(ctx: Any, grad: torch.Tensor) -> tuple:
    input, weight, *others = ctx.saved_tensors
    if others:
        # Reached only by a graph captured for inference, see :func:`apply`: recompute the activation's input.
        saved = conv_transpose2d(input, weight, *others, *ctx.geometry, "none", 0.0)
        if not needs_input(ctx.epilogue[0]):
            saved = apply_activation(saved, *ctx.epilogue)
        grad = activation_grad(grad, saved, *ctx.epilogue)
    stride, padding, _, dilation, groups = ctx.geometry
    geometry = stride, (padding[0], padding[0], padding[1], padding[1]), dilation, groups
    needs_input_grad, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    return (
        conv2d(grad, weight, None, None, *geometry, "none", 0.0) if needs_input_grad else None,
        conv2d_weight_grad(input, grad, weight.shape, ctx.weight_last, *geometry) if needs_weight else None,
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
    save=conv_transpose2d_save,
    backward=conv_transpose2d_backward,
    jvp=affine_jvp,
    batch=Batch(images=(0, 3)),
    decomposition=_in_torch,
    flops=transposed_flops,
)
