"""The autograd functions of compiled graphs: a convolution that makes statistics, and a batch norm that is given them.

    z = x ∗ w + b, (mean, variance) of z        y = act((z − mean) / √(variance + eps) · γ + β + residual)

The gradient of z accounts for the statistics, as ∂L/∂x of :mod:`gpukern.ops.batch_norm`; mean and variance have none of
their own. Between the two and the next convolution a :class:`~gpukern.compiler.mailbox.Mailbox` saves passes over
memory. Derivatives of derivatives take the operators that are differentiable themselves, one by one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from gpukern.compiler.mailbox import Mailbox
from gpukern.conv import conv_problem
from gpukern.ops._batch_norm.problem import Running, check_several_values
from gpukern.ops.batch_norm import batch_norm, batch_norm_backward, batch_norm_training, check, kept_for_backward
from gpukern.ops.conv2d import channel_sum, conv2d_input_grad, conv2d_weight_grad
from gpukern.ops.conv_norm_grad import conv2d_input_grad_norm
from gpukern.runtime.mode import Implementations
from gpukern.runtime.strides import is_channels_last
from gpukern.runtime.tensors import check_operands

_norms = Implementations("gpukern.ops._batch_norm")
_convolutions = Implementations("gpukern.conv")

#: (stride, padding, dilation, groups)
Geometry = tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int], int]


class Epilogue(NamedTuple):
    """The numbers of a batch norm's pass; ``training`` if the statistics are the batch's."""

    training: bool
    eps: float
    activation: str
    negative_slope: float


class Origin(NamedTuple):
    """What y was computed from, for the convolutions that read it: their backward does the first half of y's own.

    ``other`` as in :func:`gpukern.ops.batch_norm.batch_norm_backward`. ``again``: y may be computed anew instead of
    being saved.
    """

    mailbox: Mailbox
    z: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    other: torch.Tensor | None
    mean: torch.Tensor
    variance: torch.Tensor
    epilogue: Epilogue
    again: bool

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """In the order of :func:`gpukern.ops.batch_norm.batch_norm_backward`, after its gradient."""
        return self[1:7]


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
        recomputed = origin is not None and origin.again and needs_weight
        ctx.save_for_backward(
            x if needs_weight and not recomputed else None,
            weight if needs_x else None,
            *(origin.tensors if origin is not None else ()),
        )
        ctx.state = (
            geometry,
            (x.shape, is_channels_last(x.shape, x.stride())),
            (weight.shape, is_channels_last(weight.shape, weight.stride())),
            None if origin is None else (origin.mailbox, origin.epilogue),
        )
        if not statistics:
            return _convolutions.of(x).conv2d(problem, x, weight, bias, None, "none", 0.0)
        check_several_values((problem.N, problem.K, problem.P, problem.Q))
        ctx.set_materialize_grads(False)
        z, mean, variance = _norms.of(x).conv2d_with_statistics(problem, x, weight, bias, running)
        ctx.mark_non_differentiable(mean, variance)
        return z, mean, variance

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        x, weight, *origin = ctx.saved_tensors
        geometry, of_x, of_weight, source = ctx.state
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = None
        if needs_weight:
            if x is None:
                x = _again(origin, source[1])
            grad_weight = conv2d_weight_grad(grad, x, *of_weight, *geometry)
        shares = source is not None and source[0].is_open()
        if needs_x and shares:
            grad_x = _input_grad(grad, weight, of_x, geometry, origin, *source)
        elif needs_x:
            grad_x = conv2d_input_grad(grad, weight, *of_x, *geometry)
        return grad_x, grad_weight, channel_sum(grad) if needs_bias else None, None, None, None, None


def _again(origin: list[Any], epilogue: Epilogue) -> torch.Tensor:
    """y once more, from what it was computed from; differentiably where derivatives of derivatives are asked for."""
    z, weight, bias, other, mean, variance = origin
    training, *numbers = epilogue
    if training and torch.is_grad_enabled():
        return batch_norm_training(z, weight, bias, other, *numbers)[0]
    if training:
        return _norms.of(z).apply_statistics(z, weight, bias, other, mean, variance, *numbers)
    return batch_norm(z, weight, bias, other, mean, variance, *numbers)


def _input_grad(
    grad: torch.Tensor,
    weight: torch.Tensor,
    of_x: tuple[Any, bool],
    geometry: Geometry,
    origin: list[Any],
    mailbox: Mailbox,
    epilogue: Epilogue,
) -> torch.Tensor | None:
    """The gradient of y as far as it is known, and the sums of y's batch norm if it is known whole."""
    last = mailbox.is_last()
    added, mailbox.gradient = mailbox.gradient, None
    if not last:
        problem = conv_problem(of_x[0], weight.shape, None, *geometry)
        mailbox.gradient = _convolutions.of(grad).conv2d_input_grad(problem, grad, weight, of_x[1], added)
        return None
    shape, channels_last = of_x
    stride, padding, dilation, groups = geometry
    z, norm_weight, norm_bias, other, mean, variance = origin
    g, mailbox.sums = conv2d_input_grad_norm(
        grad, weight, shape, channels_last, stride, padding, dilation, groups, added, z, mean, variance, norm_weight,
        norm_bias, other, epilogue.eps, epilogue.activation, epilogue.negative_slope,
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
        of_residual: Mailbox | None,
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
        other = kept_for_backward(residual, y, epilogue.activation)
        ctx.save_for_backward(z, weight, bias, other, mean, variance)
        ctx.state = epilogue, mailbox, of_residual
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        epilogue, mailbox, of_residual = ctx.state
        needs_z, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        sums = None
        if mailbox is not None and mailbox.is_open():
            grad, sums = mailbox.collect(grad)
        if grad is None:
            return (None,) * 10
        grad_z = grad_weight = grad_bias = None
        grad_residual = grad
        if sums is not None:
            z, weight, bias, _, mean, variance = ctx.saved_tensors
            grad_z, grad_weight, grad_bias = _norms.of(z).gradients_from_sums(
                grad, z, weight, bias, mean, variance, sums, epilogue.training, epilogue.eps
            )
        else:
            inner = needs_residual and epilogue.activation != "none"
            grad_z, grad_weight, grad_bias, grad_inner = batch_norm_backward(
                grad, *ctx.saved_tensors, *epilogue, needs_z, needs_weight or needs_bias, inner
            )
            grad_residual = grad_inner if inner else grad
        return (
            grad_z if needs_z else None,
            grad_weight if needs_weight else None,
            grad_bias if needs_bias else None,
            _hand_over(grad_residual, of_residual) if needs_residual else None,
            *(None,) * 6,
        )


def _hand_over(gradient: torch.Tensor, mailbox: Mailbox | None) -> torch.Tensor | None:
    return mailbox.leave(gradient) if mailbox is not None and mailbox.is_open() else gradient
