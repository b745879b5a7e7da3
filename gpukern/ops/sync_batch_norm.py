"""Batch norm in training over the batches of all processes of a group.

Each process makes mean, variance and count of its own values; one message gathers those of all, which every process
merges in the same order (Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983). Backward adds
up Σ g and Σ g·x̂, g = ∂L/∂y, of all in one message. With these and the n values of all, the formulas are those of
:mod:`gpukern.ops.batch_norm`; the gradients of weight and bias stay the process's own, as those of any other layer.

Every process of the group has to call it, forward and backward, one with an empty batch too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from gpukern.ops._batch_norm.problem import Running
from gpukern.ops.batch_norm import check
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import resolved

_implementations = Implementations("gpukern.ops._sync_batch_norm")


@torch._disable_dynamo  # torch.compiler.disable, but for its import, which takes a second
def apply(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    momentum: float,
    eps: float,
    group: Any,
) -> torch.Tensor:
    """Batch norm of ``input`` [N, C, ...] with the statistics of all processes, updating the running ones if given.

    Raises
    ------
    RuntimeError
        for sizes, dtypes and devices that do not fit together, as batch norm, before anything is sent; and for a second
        derivative.
    """
    check(input, weight, bias, None, running_mean=running_mean, running_var=running_var)
    running = None if running_mean is None else Running(running_mean, running_var, momentum)
    return _SyncBatchNorm.apply(input, weight, bias, running, eps, group)


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input, weight, bias, running: Running | None, eps: float, group: Any) -> torch.Tensor:
        input, weight, bias = map(resolved, (input, weight, bias))
        implementation = _implementations.of(input)
        messages = _gathered(implementation.local_statistics(input), group)
        mean, variance, count = implementation.merged_statistics(messages, running)
        ctx.save_for_backward(input, weight, bias, mean, variance, count)
        ctx.state = eps, group
        return implementation.batch_norm(input, weight, bias, None, mean, variance, eps, "none", 0.0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        with torch.no_grad():
            grads = _SyncBatchNorm.gradients(ctx, grad)
        if torch.is_grad_enabled():
            grads = _Once.apply(grad, *ctx.saved_tensors[:3], *grads)
        return *grads, None, None, None

    @staticmethod
    def gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight, bias, mean, variance, count = ctx.saved_tensors
        (eps, group), (needs_input, needs_weight, needs_bias, *_) = ctx.state, ctx.needs_input_grad
        grad, implementation = resolved(grad), _implementations.of(input)
        sums = implementation.sums_of(grad, input, mean, variance, eps)
        grad_input = grad_weight = grad_bias = None
        if needs_weight:
            grad_weight = sums[1].to(weight.dtype, copy=True)
        if needs_bias:
            grad_bias = sums[0].to(bias.dtype, copy=True)
        if needs_input:
            dist.all_reduce(sums, group=group)
            of_all = mean, variance, sums, True, eps, count
            grad_input = implementation.gradients_from_sums(grad, input, weight, None, *of_all)[0]
        return grad_input, grad_weight, grad_bias


class _Once(torch.autograd.Function):
    """Gradients that depend on four tensors in a way that cannot be differentiated: an error, and never a zero."""

    @staticmethod
    def forward(ctx: Any, grad, input, weight, bias, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return tuple(None if each is None else each.view_as(each) for each in grads)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        raise RuntimeError("SyncBatchNorm has no second derivative")


def _gathered(message: torch.Tensor, group: Any) -> torch.Tensor:
    """The messages of all processes: [processes, length]."""
    messages = message.new_empty((dist.get_world_size(group), message.numel()))
    if dist.get_backend(group) == "gloo":
        dist.all_gather(list(messages.unbind()), message, group=group)
    else:
        # PyTorch 2.13 renamed it.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(messages, message, group=group)
    return messages
