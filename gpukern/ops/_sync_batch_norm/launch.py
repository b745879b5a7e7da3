"""Statistics of several processes by the kernels, in functions of the same names and signatures as ``reference.py``."""

from __future__ import annotations

import torch

from gpukern.ops._batch_norm.launch import batch_norm as batch_norm
from gpukern.ops._batch_norm.launch import gradients_from_sums as gradients_from_sums
from gpukern.ops._batch_norm.launch import keep, make_statistics, norm_of, statistics_for
from gpukern.ops._batch_norm.launch import sums_of as sums_of
from gpukern.ops._batch_norm.problem import Running
from gpukern.ops._batch_norm.tiles import tiles_of
from gpukern.ops._reduction.functions import Statistics
from gpukern.ops._sync_batch_norm import kernels
from gpukern.runtime.integers import cdiv
from gpukern.runtime.launcher import launch
from gpukern.runtime.tensors import check_kernel_dtype

_BLOCK = 128


def local_statistics(input: torch.Tensor) -> torch.Tensor:
    check_kernel_dtype("batch_norm", input.dtype)
    C, device = input.shape[1], input.device
    count = input.numel() // C
    message = torch.full((2 * C + 1,), float(count), dtype=torch.float32, device=device)
    if count:
        mean, variance = message[:C], message[C : 2 * C]
        statistics = Statistics(mean=mean, variance=variance)
        make_statistics(tiles_of(True, input), statistics, norm_of(mean, variance, None, None), False)
    return message


def merged_statistics(
    messages: torch.Tensor, running: Running | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    processes, length = messages.shape
    C, device = length // 2, messages.device
    statistics = statistics_for(C, device, running)
    count = torch.empty(1, dtype=torch.float32, device=device)
    launch(
        kernels.merge_processes_kernel,
        (cdiv(C, _BLOCK),),
        device,
        (messages, statistics, count, processes, C),
        {"BLOCK": _BLOCK, "num_warps": 4},
    )
    keep(running, statistics)
    return statistics.mean, statistics.variance, count
