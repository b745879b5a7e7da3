"""The autograd functions of compiled graphs: a convolution that makes statistics, and a batch norm that is given them.

    z = x ∗ w + b, (mean, variance) of z        y = act((z − mean) / √(variance + eps) · γ + β + residual)

The gradient of z accounts for the statistics, as ∂L/∂x of :mod:`gpukern.ops.batch_norm`; mean and variance have none of
their own. Between the two and the next convolution a :class:`~gpukern.compiler.mailbox.Mailbox` saves passes over
memory. Derivatives of derivatives take the operators that are differentiable themselves, one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from gpukern.compiler.mailbox import Mailbox
from gpukern.compiler.origin import Epilogue, Origin, made, origin_of, other_of, pair_of, put_together, taken_apart
from gpukern.conv import conv_problem
from gpukern.ops._batch_norm.problem import Running, check_several_values
from gpukern.ops.batch_norm import batch_norm_backward, batch_norm_training, check, gradients_from_sums
from gpukern.ops.conv2d import channel_sum, conv2d_input_grad, conv2d_weight_grad
from gpukern.ops.conv_batch_norm import conv2d_batch_statistics
from gpukern.ops.conv_norm_grad import conv2d_input_grad_norm
from gpukern.ops.norm_pair import normalize_pair_gradients, normalize_pair_sums
from gpukern.runtime.mode import Implementations
from gpukern.runtime.strides import is_channels_last
from gpukern.runtime.tensors import check_operands

_norms = Implementations("gpukern.ops._batch_norm")
_convolutions = Implementations("gpukern.conv")

#: (stride, padding, dilation, groups)
Geometry = tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int], int]


class Convolution(torch.autograd.Function):
    """``z = x ∗ w + b``, and with ``statistics`` its mean and biased variance for each channel, at least fp32 [K]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        geometry: Geometry,
        statistics: bool,
        running: Running | None,
        origin: Origin | None,
    ) -> Any:
        check_operands("conv2d", x, weight, bias)
        problem = conv_problem(x.shape, weight.shape, None if bias is None else bias.shape, *geometry)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        again = origin is not None and origin.again
        tensors, shape_of_origin = taken_apart(origin)
        ctx.save_for_backward(x if needs_weight and not again else None, weight if needs_x else None, *tensors)
        ctx.state = (
            geometry,
            (x.shape, is_channels_last(x.shape, x.stride())),
            (weight.shape, is_channels_last(weight.shape, weight.stride())),
            shape_of_origin,
        )
        if not statistics:
            return _convolutions.of(x).conv2d(problem, x, weight, bias, None, "none", 0.0)
        check_several_values((problem.N, problem.K, problem.P, problem.Q))
        ctx.set_materialize_grads(False)
        z, mean, variance = conv2d_batch_statistics(problem, x, weight, bias, running)
        ctx.mark_non_differentiable(mean, variance)
        return z, mean, variance

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        x, weight, *tensors = ctx.saved_tensors
        geometry, of_x, of_weight, shape_of_origin = ctx.state
        origin = put_together(shape_of_origin, tensors)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = None
        if needs_weight:
            if x is None:
                x = made(origin)
            grad_weight = conv2d_weight_grad(grad, x, *of_weight, *geometry)
        if needs_x and origin is not None and origin.mailbox.is_open():
            grad_x = _input_grad(grad, weight, of_x, geometry, origin)
        elif needs_x:
            grad_x = conv2d_input_grad(grad, weight, *of_x, *geometry)
        return grad_x, grad_weight, channel_sum(grad) if needs_bias else None, None, None, None, None


def _input_grad(
    grad: torch.Tensor, weight: torch.Tensor, of_x: tuple[Any, bool], geometry: Geometry, origin: Origin
) -> torch.Tensor | None:
    """The gradient of y as far as it is known, and the sums of y's batch norm if it is known whole."""
    mailbox, (shape, channels_last) = origin.mailbox, of_x
    assert mailbox is not None  # what is read has one
    left = mailbox.arrive()
    added, left.gradient = left.gradient, None
    if left.arrived < mailbox.users:
        problem = conv_problem(shape, weight.shape, None, *geometry)
        left.gradient = _convolutions.of(grad).conv2d_input_grad(problem, grad, weight, channels_last, added)
        return None
    stride, padding, dilation, groups = geometry
    z, norm_weight, norm_bias, _, mean, variance = origin.tensors
    _, eps, activation, negative_slope = origin.epilogue
    g, left.sums = conv2d_input_grad_norm(
        grad, weight, shape, channels_last, stride, padding, dilation, groups, added, z, mean, variance, norm_weight,
        norm_bias, other_of(origin), eps, activation, negative_slope,
    )  # fmt: skip
    return g


class Norm(torch.autograd.Function):
    """``y = act((z − mean) / √(variance + eps) · γ + β + residual)``, and the mean and the variance.

    ``mean`` and ``variance`` None: the batch's, made here, with ``running`` updated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        mean: torch.Tensor | None,
        variance: torch.Tensor | None,
        running: Running | None,
        epilogue: Epilogue,
        mailbox: Mailbox | None,
        of_residual: Origin | None,
        again: bool,
    ) -> Any:
        training, *numbers = epilogue
        operands = z, weight, bias, residual
        check(*operands)
        implementation = _norms.of(z)
        if mean is None or variance is None:
            check_several_values(z.shape)
            y, mean, variance = implementation.batch_norm_training(*operands, *numbers, running)
        else:
            function = implementation.apply_statistics if training else implementation.batch_norm
            y = function(*operands, mean, variance, *numbers)
        origin = origin_of(mailbox, z, weight, bias, residual, y, mean, variance, epilogue, again, of_residual)
        tensors, shape_of_origin = taken_apart(origin)
        ctx.save_for_backward(*tensors)
        ctx.state = shape_of_origin, None if of_residual is None else of_residual.mailbox
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        shape_of_origin, of_residual = ctx.state
        epilogue, mailbox = shape_of_origin.epilogue, shape_of_origin.mailbox
        needs_z, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        sums = None
        if mailbox is not None and mailbox.is_open():
            grad, sums = mailbox.collect(grad)
        if grad is None:
            return (None,) * 11
        grad_residual = grad
        origin = put_together(shape_of_origin, ctx.saved_tensors)
        z, weight, bias, _, mean, variance = origin.tensors
        if sums is not None:
            grad_z, grad_weight, grad_bias = gradients_from_sums(
                grad, z, weight, bias, mean, variance, sums, epilogue.training, epilogue.eps
            )
        else:
            inner = needs_residual and epilogue.activation != "none"
            grad_z, grad_weight, grad_bias, grad_inner = batch_norm_backward(
                grad,
                z,
                weight,
                bias,
                other_of(origin),
                mean,
                variance,
                *epilogue,
                needs_z,
                needs_weight or needs_bias,
                inner,
            )
            grad_residual = grad_inner if inner else grad
        return (
            grad_z if needs_z else None,
            grad_weight if needs_weight else None,
            grad_bias if needs_bias else None,
            _hand_over(grad_residual, of_residual) if needs_residual else None,
            *(None,) * 7,
        )


class NormPair(torch.autograd.Function):
    """``y = act(norm(z_a) + norm(z_b))`` with the batch's statistics; ``other`` is the origin of the second."""

    @staticmethod
    def forward(
        ctx: Any,
        z: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        z_b: torch.Tensor,
        weight_b: torch.Tensor | None,
        bias_b: torch.Tensor | None,
        mean: torch.Tensor,
        variance: torch.Tensor,
        epilogue: Epilogue,
        other: Origin,
        mailbox: Mailbox | None,
        again: bool,
    ) -> torch.Tensor:
        origin = Origin(mailbox, z, weight, bias, None, mean, variance, epilogue, again, True, other)
        y = pair_of(origin)
        kept = None if again or epilogue.activation == "none" else y
        tensors, ctx.state = taken_apart(origin._replace(kept=kept))
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        mailbox, sums = ctx.state.mailbox, None
        if mailbox is not None and mailbox.is_open():
            grad, sums = mailbox.collect(grad)
        if grad is None:
            return (None,) * 12
        origin = put_together(ctx.state, ctx.saved_tensors)
        if torch.is_grad_enabled():
            return *_recorded_pair(origin, grad, ctx.needs_input_grad[:6]), *(None,) * 6
        other, (_, _, activation, negative_slope) = origin.source, origin.epilogue
        norms = origin.z, origin.numbers, other.z, other.numbers
        if sums is None:
            y = other_of(origin)
            sums = normalize_pair_sums(grad, y, *norms, activation, negative_slope)
            of_b = sums[2]
        else:
            y, activation = None, "none"  # grad is behind the activation
            of_b = _norms.of(grad).sums_of(grad, other.z, other.mean, other.variance, other.epilogue.eps)[1]
        found = normalize_pair_gradients(grad, y, *norms, sums[:2], of_b, activation, negative_slope)
        grad_z, grad_z_b, *of_parameters = found
        grads = grad_z, *of_parameters[:2], grad_z_b, *of_parameters[2:]
        wanted = zip(grads, ctx.needs_input_grad, strict=False)
        return *(each if needed else None for each, needed in wanted), *(None,) * 6


def _recorded_pair(origin: Origin, grad: torch.Tensor, needed: Sequence[bool]) -> Iterator[torch.Tensor | None]:
    """The gradients of :class:`NormPair` by differentiable operators, one norm after the other."""
    other = origin.source
    assert other is not None
    # Aliases of the saved tensors: gradients by them alone, and through them any higher order.
    tensors = [
        None if each is None else each.view_as(each)
        for each in (origin.z, origin.weight, origin.bias, other.z, other.weight, other.bias)
    ]
    z, weight, bias, *of_other = tensors
    _, *numbers = origin.epilogue
    added = batch_norm_training(*of_other, None, other.epilogue.eps, "none", 0.0)[0]
    y = batch_norm_training(z, weight, bias, added, *numbers)[0]
    wanted = [each for each, need in zip(tensors, needed, strict=True) if need and each is not None]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return (next(found) if need and each is not None else None for each, need in zip(tensors, needed, strict=True))


def _hand_over(gradient: torch.Tensor, mailbox: Mailbox | None) -> torch.Tensor | None:
    return mailbox.leave(gradient) if mailbox is not None and mailbox.is_open() else gradient


def eager(function: Any) -> Any:
    """``function.apply`` without looking for transforms and for tensors that outlived theirs, which takes a
    microsecond: callers have excluded both.
    """
    return super(torch.autograd.Function, function).apply


convolve, normalize, add_norms = eager(Convolution), eager(Norm), eager(NormPair)
