"""The autograd function of a 1×1 convolution between two batch norms; see :mod:`gpukern.ops.pointwise_norm`.

    y = act(norm(f(norm(z)) ∗ w) + added)

``added`` is a residual, or another convolution's output with a batch norm of its own, as in a projection shortcut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from gpukern.compiler.mailbox import Mailbox
from gpukern.compiler.origin import Epilogue
from gpukern.ops._batch_norm.problem import Norm, Running
from gpukern.ops._pointwise_norm.problem import Added, Inner, Moments, Outer
from gpukern.ops.activation import activation_grad
from gpukern.ops.batch_norm import batch_norm_training, gradients_from_sums
from gpukern.ops.conv2d import conv2d
from gpukern.ops.pointwise_norm import convolve_between_norms, convolve_between_norms_backward
from gpukern.runtime.mode import Implementations

_norms = Implementations("gpukern.ops._batch_norm")


class Numbers(NamedTuple):
    """Of the convolution's input, of its output, and of what is added: all but tensors with gradients."""

    mean: torch.Tensor
    variance: torch.Tensor
    inner: Epilogue
    outer: Epilogue
    added_mean: torch.Tensor | None
    added_variance: torch.Tensor | None
    added_eps: float


class PointwiseNorm(torch.autograd.Function):
    """``added_mean`` of ``numbers`` tells a convolution's output from a residual, whose mailbox is ``of_added``."""

    @staticmethod
    def forward(
        ctx: Any,
        z: torch.Tensor,
        inner_weight: torch.Tensor | None,
        inner_bias: torch.Tensor | None,
        weight: torch.Tensor,
        norm_weight: torch.Tensor | None,
        norm_bias: torch.Tensor | None,
        added: torch.Tensor | None,
        added_weight: torch.Tensor | None,
        added_bias: torch.Tensor | None,
        numbers: Numbers,
        running: Running | None,
        mailbox: Mailbox | None,
        of_added: Mailbox | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        of_inner, of_outer = numbers.inner, numbers.outer
        norm = Norm(numbers.mean, numbers.variance, inner_weight, inner_bias, of_inner.eps)
        inner = Inner(z, norm, of_inner.activation, of_inner.negative_slope)
        outer = Outer(norm_weight, norm_bias, of_outer.eps, of_outer.activation, of_outer.negative_slope)
        other = None
        if added is not None:
            other = Added(added, _added_norm(numbers, added_weight, added_bias))
        y, moments = convolve_between_norms(inner, weight, outer, other, running)
        is_pair = numbers.added_mean is not None
        ctx.save_for_backward(
            *(z, inner_weight, inner_bias, weight, norm_weight, norm_bias, added if is_pair else None),
            *(added_weight, added_bias, None if of_outer.activation == "none" else y),
            *(numbers.mean, numbers.variance, numbers.added_mean, numbers.added_variance, *moments),
        )
        ctx.state = of_inner, of_outer, numbers.added_eps, mailbox, of_added
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(moments.center, moments.variance)
        return y, moments.center, moments.variance

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        *operands, y, mean, variance, added_mean, added_variance, total, center, projected, of_z = ctx.saved_tensors
        of_inner, of_outer, added_eps, mailbox, of_added = ctx.state
        needs, sums = ctx.needs_input_grad[: len(operands)], None
        if mailbox is not None and mailbox.is_open():
            grad, sums = mailbox.collect(grad)
        if grad is None:
            return (None,) * 13
        numbers = Numbers(mean, variance, of_inner, of_outer, added_mean, added_variance, added_eps)
        g = grad
        if sums is None and of_outer.activation != "none":
            g = activation_grad(grad, y, of_outer.activation, of_outer.negative_slope)
        if torch.is_grad_enabled():
            return *_recorded(operands, numbers, g, needs), *(None,) * 4
        z, inner_weight, inner_bias, weight, norm_weight, norm_bias, added, added_weight, added_bias = operands
        norm = Norm(mean, variance, inner_weight, inner_bias, of_inner.eps)
        found = convolve_between_norms_backward(
            g,
            Inner(z, norm, of_inner.activation, of_inner.negative_slope),
            weight,
            Outer(norm_weight, norm_bias, of_outer.eps, of_outer.activation, of_outer.negative_slope),
            Moments(total, center, projected, of_z),
            (*needs[3:6], any(needs[:3])),
        )
        grads: tuple[torch.Tensor | None, ...] = (None,) * 3
        if found.inner is not None:
            grads = gradients_from_sums(
                found.inner, z, inner_weight, inner_bias, mean, variance, found.sums, True, of_inner.eps
            )
        of_other: tuple[torch.Tensor | None, ...] = (None,) * 3
        if added is not None and any(needs[6:]):
            if sums is None:
                sums = _norms.of(g).sums_of(g, added, added_mean, added_variance, added_eps)
            of_other = gradients_from_sums(
                g, added, added_weight, added_bias, added_mean, added_variance, sums, True, added_eps
            )
        elif needs[6]:
            of_other = _hand_over(g, of_added), None, None
        grads = *grads, found.weight, found.norm_weight, found.norm_bias, *of_other
        return *(each if needed else None for each, needed in zip(grads, needs, strict=True)), *(None,) * 4


def _added_norm(numbers: Numbers, weight: torch.Tensor | None, bias: torch.Tensor | None) -> Norm | None:
    if numbers.added_mean is None:
        return None
    return Norm(numbers.added_mean, numbers.added_variance, weight, bias, numbers.added_eps)


def _hand_over(gradient: torch.Tensor, mailbox: Mailbox | None) -> torch.Tensor | None:
    return mailbox.leave(gradient) if mailbox is not None and mailbox.is_open() else gradient


def _recorded(
    operands: Sequence[Any], numbers: Numbers, g: torch.Tensor, needs: Sequence[bool]
) -> list[torch.Tensor | None]:
    """The gradients by differentiable operators, one after the other; ``g`` is that of the activation's input."""
    # Aliases of the saved tensors: gradients by them alone, and through them any higher order.
    tensors = [None if each is None else each.view_as(each) for each in operands]
    z, inner_weight, inner_bias, weight, norm_weight, norm_bias, added, added_weight, added_bias = tensors
    (_, *inner), outer = numbers.inner, numbers.outer
    y = batch_norm_training(z, inner_weight, inner_bias, None, *inner)[0]
    v = conv2d(y, weight, None, None, (1, 1), (0, 0, 0, 0), (1, 1), 1, "none", 0.0)
    u = batch_norm_training(v, norm_weight, norm_bias, None, outer.eps, "none", 0.0)[0]
    if added is not None:
        u = u + batch_norm_training(added, added_weight, added_bias, None, numbers.added_eps, "none", 0.0)[0]
    wanted = [each for each, need in zip(tensors, needs, strict=True) if need and each is not None]
    found = iter(torch.autograd.grad(u, wanted, g, create_graph=True))
    grads = [next(found) if need and each is not None else None for each, need in zip(tensors, needs, strict=True)]
    if added is None and needs[6]:
        grads[6] = g
    return grads
