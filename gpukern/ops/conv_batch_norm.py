"""A convolution and the batch norm that follows it in training: the convolution's epilogue computes the statistics.

Its output z, which the backward needs, is written once and read once; a batch norm by itself reads it twice. The
mathematics is that of :mod:`gpukern.ops.conv2d` and :mod:`gpukern.ops.batch_norm`, and so is the backward.
"""

from __future__ import annotations

from typing import Any

import torch

from gpukern.conv import ConvProblem, Padding, Pair, conv_problem, output_size
from gpukern.ops._batch_norm import reference
from gpukern.ops._batch_norm.problem import Running, check_several_values, check_sizes
from gpukern.ops.activation import affine_jvp
from gpukern.ops.batch_norm import batch_norm_backward, batch_norm_training, check_numbers, kept_for_backward, norm_jvp
from gpukern.ops.conv2d import channel_sum, conv2d, conv2d_input_grad, conv2d_weight_grad, first_output_flops
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import Operator, needs_operator, resolved
from gpukern.runtime.tensors import check_alike, format_kept_by, memory_format_of

_implementations = Implementations("gpukern.ops._batch_norm")

_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"


def apply(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    momentum: float,
    eps: float,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    """``act(batch_norm(x ∗ w + b) + residual)`` with the batch's statistics; updates the running ones if there are any.

    Raises torch's ValueError for one value per channel.
    """
    operands = input, weight, bias, norm_weight, norm_bias, residual
    arguments = *operands, stride, padding, dilation, groups, eps, activation, negative_slope
    check_several_values(_check(*operands, stride, padding, dilation, groups, running_mean, running_var))
    if running_mean is None:
        return conv2d_batch_norm(*arguments)[0]
    running = Running(running_mean, running_var, momentum)
    if not needs_operator((*operands, running_mean, running_var)):
        return conv2d_batch_norm(*arguments, running)[0]
    output, z, mean, variance = conv2d_batch_norm(*arguments)
    if z.numel():
        reference.update(running, mean, variance, z.numel() // z.shape[1])
    return output


def _check(
    input, weight, bias, norm_weight, norm_bias, residual, stride, padding, dilation, groups, mean=None, var=None
) -> tuple[int, int, int, int]:
    """The output's shape. Raises RuntimeError for sizes, dtypes and devices that do not fit."""
    check_alike("conv2d", input, weight, bias, residual)
    bias_shape = None if bias is None else bias.shape
    P, Q = output_size(input.shape, weight.shape, bias_shape, stride, padding, dilation, groups)
    shape = input.shape[0], weight.shape[0], P, Q
    check_sizes(shape, None if residual is None else residual.shape)
    check_numbers(input, shape[1], weight=norm_weight, bias=norm_bias, running_mean=mean, running_var=var)
    return shape


def _forward(input, weight, bias, norm_weight, norm_bias, residual, *others) -> tuple[torch.Tensor, ...]:
    geometry, epilogue = others[:4], others[4:]
    operands = input, weight, bias, norm_weight, norm_bias, residual
    if not isinstance(epilogue[-1], Running):  # those of eager calls, which were checked with them
        _check(*operands, *geometry)
    problem = conv_problem(input.shape, weight.shape, None if bias is None else bias.shape, *geometry)
    return _implementations.of(input).conv2d_batch_norm(problem, *operands, *epilogue)


def _fake(*arguments) -> tuple[torch.Tensor, ...]:
    input, weight = arguments[:2]
    shape = _check(*arguments[:10])
    z = input.new_empty(shape).to(memory_format=memory_format_of(input, weight))
    y = z.new_empty(shape).to(memory_format=format_kept_by(z))
    dtype = torch.promote_types(input.dtype, torch.float32)
    return y, z, *(input.new_empty(shape[1], dtype=dtype) for _ in range(2))


def _save(ctx: Any, arguments: tuple, outputs: tuple) -> None:
    input, weight, _, norm_weight, norm_bias, residual, *rest = arguments
    epilogue = rest[4:7]
    output, z, mean, var = outputs
    other = kept_for_backward(residual, output, epilogue[1])
    ctx.save_for_backward(input, weight, z, norm_weight, norm_bias, other, mean, var)
    ctx.state = rest[:4], epilogue
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: torch.Tensor | None, grad_z: torch.Tensor | None, *_: None) -> tuple:
    input, weight, *saved = ctx.saved_tensors
    geometry, epilogue = ctx.state
    needs_input, needs_weight, needs_bias, needs_scale, needs_shift, needs_residual, *rest = ctx.needs_input_grad
    needs_z = needs_input or needs_weight or needs_bias
    inner = needs_residual and epilogue[1] != "none"
    grads: tuple = (None,) * 4
    if grad is not None:
        grads = batch_norm_backward(grad, *saved, True, *epilogue, needs_z, needs_scale or needs_shift, inner)
    # z itself has a gradient only if derivatives of derivatives are requested.
    by_z = grad_z if grad is None else grads[0] if grad_z is None else grads[0] + grad_z
    if by_z is None:
        needs_input = needs_weight = needs_bias = False
    return (
        conv2d_input_grad(by_z, weight, input.shape, _is_last(input), *geometry) if needs_input else None,
        conv2d_weight_grad(by_z, input, weight.shape, _is_last(weight), *geometry) if needs_weight else None,
        channel_sum(by_z) if needs_bias else None,
        grads[1] if needs_scale else None,
        grads[2] if needs_shift else None,
        (grads[3] if inner else grad) if needs_residual else None,
        *(None,) * len(rest),
    )


def _jvp(operator: Operator, arguments: tuple, tangents: tuple, outputs: tuple) -> tuple:
    input, weight, bias, norm_weight, norm_bias, residual, *rest = arguments
    output, z, mean, var = outputs
    geometry, epilogue = rest[:4], rest[4:]
    of_z = affine_jvp(conv2d, (input, weight, bias, None, *geometry, "none", 0.0), (*tangents[:3], None), z)
    operands = z, norm_weight, norm_bias, residual
    of_y = norm_jvp(operands, mean, var, True, epilogue, (of_z, *tangents[3:]), output)
    return of_y, torch.zeros_like(z) if of_z is None else of_z, None, None


def _is_last(tensor: torch.Tensor) -> bool:
    return memory_format_of(tensor) is torch.channels_last


def _in_torch(
    input, weight, bias, norm_weight, norm_bias, residual, stride, padding, dilation, groups, *epilogue
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    z = conv2d.decomposition(input, weight, bias, None, stride, padding, dilation, groups, "none", 0.0)
    y, mean, variance = batch_norm_training.decomposition(z, norm_weight, norm_bias, residual, *epilogue)
    return y, z, mean, variance


#: y, the convolution's output z, and the mean and the biased variance of z.
conv2d_batch_norm = Operator(
    "conv2d_batch_norm",
    "(Tensor input, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? residual, "
    f"{_GEOMETRY}, float eps, str activation, float negative_slope) -> (Tensor, Tensor, Tensor, Tensor)",
    forward=_forward,
    fake=_fake,
    save=_save,
    backward=_backward,
    jvp=_jvp,
    decomposition=_in_torch,
    flops=first_output_flops,
)


def conv2d_batch_statistics(
    problem: ConvProblem,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    running: Running | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (z = x ∗ w + b, mean, biased variance of z [C] in fp32 at least) in one launch; update ``running``.

    A plain function for the inside of an autograd Function, which records nothing. The sizes are those of ``problem``,
    which :func:`gpukern.conv.conv_problem` has checked.
    """
    check_alike("conv2d", input, weight, bias)
    return _implementations.of(input).conv2d_with_statistics(
        problem, resolved(input), resolved(weight), resolved(bias), running
    )
