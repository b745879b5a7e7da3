"""3-D transposed convolution: the convolution's input gradient as a separate operation, on the same kernels.

As :mod:`gpukern.ops.conv_transpose2d`, which has what does not depend on the number of dimensions.
"""

from __future__ import annotations

from typing import Any

import torch

from gpukern.conv import Triple, VolumeProblem, transposed_sizes, transposed_volume_problem
from gpukern.ops._activation.reference import in_torch
from gpukern.ops.activation import affine_jvp
from gpukern.ops.conv2d import check_residual, transposed_flops
from gpukern.ops.conv3d import conv3d, conv3d_weight_grad
from gpukern.ops.conv_transpose2d import save_operands, transposed, transposed_gradients
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import Operator
from gpukern.runtime.tensors import check_operands, memory_format_of
from gpukern.runtime.transforms import Batch

_implementations = Implementations("gpukern.conv.volumes")


def apply(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: Triple,
    padding: Triple,
    output_padding: Triple,
    dilation: Triple,
    groups: int,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    """Compute ``act(x ∗ᵀ w + b + residual)`` in one kernel, or in two for a gradient through an activation."""
    operands, geometry = (input, weight, bias, residual), (stride, padding, output_padding, dilation, groups)
    return transposed(conv_transpose3d, operands, geometry, activation, negative_slope)


def _problem(input, weight, bias, residual, *geometry) -> VolumeProblem:
    check_operands("conv_transpose3d", input, weight, bias, residual)
    problem = transposed_volume_problem(input.shape, weight.shape, None if bias is None else bias.shape, *geometry)
    if residual is not None:
        check_residual(residual, problem.shapes[0])
    return problem


def _forward(
    input, weight, bias, residual, stride, padding, output_padding, dilation, groups, activation, negative_slope
) -> torch.Tensor:
    problem = _problem(input, weight, bias, residual, stride, padding, output_padding, dilation, groups)
    launch = _implementations.of(input).conv_transpose3d
    return launch(problem, input, weight, bias, residual, activation, negative_slope)


def _fake(
    input, weight, bias, residual, stride, padding, output_padding, dilation, groups, activation, negative_slope
) -> torch.Tensor:
    bias_shape, geometry = None if bias is None else bias.shape, (stride, padding, output_padding, dilation, groups)
    sizes = transposed_sizes(input.shape, weight.shape, bias_shape, *geometry)
    shape = (input.shape[0], weight.shape[1] * groups, *sizes)
    if residual is not None:
        check_residual(residual, shape)
    return input.new_empty(shape).to(memory_format=memory_format_of(input, weight))


def _backward(ctx: Any, grad: torch.Tensor) -> tuple:
    return transposed_gradients(ctx, grad, conv_transpose3d, conv3d, conv3d_weight_grad)


def _in_torch(
    input, weight, bias, residual, stride, padding, output_padding, dilation, groups, activation, negative_slope
) -> torch.Tensor:
    geometry = stride, padding, output_padding, groups, dilation
    y = torch.ops.aten.conv_transpose3d.input(input, weight, bias, *geometry)
    return in_torch(y if residual is None else torch.ops.aten.add.Tensor(y, residual), activation, negative_slope)


#: ``output_padding`` below the stride.
conv_transpose3d = Operator(
    "conv_transpose3d",
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
