"""Statistics of several processes in plain torch."""

from __future__ import annotations

import torch

from gpukern.ops._batch_norm.problem import Running
from gpukern.ops._batch_norm.reference import apply_statistics, statistics, update
from gpukern.ops._batch_norm.reference import gradients_from_sums as gradients_from_sums
from gpukern.ops._batch_norm.reference import sums_of as sums_of

#: As the kernels, by the difference first.
batch_norm = apply_statistics


def local_statistics(input: torch.Tensor) -> torch.Tensor:
    """Mean and biased variance of each channel and the number of its values, [2 · C + 1], in fp32 at least."""
    mean, variance = statistics(input)
    return torch.cat([mean, variance, mean.new_full((1,), input.numel() // input.shape[1])])


def merged_statistics(
    messages: torch.Tensor, running: Running | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(mean [C], biased variance [C], count [1]) of all processes' ``messages`` [processes, 2 · C + 1].

    Updates the running statistics, if any process has a value.
    """
    C = messages.shape[1] // 2
    means, variances, counts = messages.split([C, C, 1], 1)
    count = counts.sum(0)
    share = counts / count.clamp(min=1)
    mean = (means * share).sum(0)
    variance = ((variances + (means - mean).square()) * share).sum(0)
    if running is not None and count:
        update(running, mean, variance, max(int(count), 2))
    return mean, variance, count
