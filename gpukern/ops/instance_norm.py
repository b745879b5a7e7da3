"""Instance norm: group norm with a channel to a group, or with running statistics batch norm's inference.

With the input's own statistics the running ones follow the mean, over the images, of these: of the means, and of the
unbiased variances. See Ulyanov, Vedaldi and Lempitsky, "Instance Normalization", 2016, and for the gradients
:mod:`gpukern.ops.group_norm`.
"""

from __future__ import annotations

import torch

from gpukern.ops._batch_norm.problem import Running
from gpukern.ops._group_norm import reference
from gpukern.ops.batch_norm import batch_norm, check
from gpukern.ops.group_norm import group_norm
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import needs_operator, resolved

_implementations = Implementations("gpukern.ops._group_norm")


def apply(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    """Instance norm with the statistics of each image if ``use_input_stats``, updating the running ones if any."""
    operands, epilogue = (input, weight, bias, residual), (eps, activation, negative_slope)
    if not use_input_stats:
        return batch_norm(*operands, running_mean, running_var, *epilogue)
    check(*operands, running_mean=running_mean, running_var=running_var)
    if not input.shape[1]:
        return batch_norm(*operands, input.new_empty(0), input.new_empty(0), *epilogue)  # nothing has no groups
    output, mean, variance = group_norm(*operands, input.shape[1], *epilogue)
    if running_mean is not None and running_var is not None and input.numel():
        _update(mean.detach(), variance.detach(), Running(running_mean, running_var, momentum), input)
    return output


def _update(mean: torch.Tensor, variance: torch.Tensor, running: Running, input: torch.Tensor) -> None:
    pixels = input.numel() // (input.shape[0] * input.shape[1])
    # A registered operator changes none of its arguments: traced graphs update beside it.
    traced = needs_operator((input, running.mean, running.variance))
    implementation = reference if traced else _implementations.of(input)
    tensors = running.mean, running.variance
    given = tensors if traced else tuple(resolved(each) for each in tensors)
    implementation.update_running(mean, variance, *given, running.momentum, pixels)
    for tensor, written in zip(tensors, given, strict=True):
        if tensor is not written:
            tensor.copy_(written)
