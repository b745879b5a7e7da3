"""How long a forward pass takes on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from gpukern.fuse.report import Timing

#: Passes before any is timed: kernels are compiled, and graphs captured.
_WARM_UP = 10
_PASSES = 100


@torch.no_grad()
def time_forward(call: Callable[..., Any], inputs: tuple[torch.Tensor, ...], module: torch.nn.Module) -> Timing:
    """Of ``call(*inputs)`` on the inputs' CUDA device: the median and the worst of a hundred passes, one at a time.

    What the host does counts where the device waits for it. Peak memory is that of the passes and the tensors of
    ``module``, whatever else is on the device.
    """
    with torch.cuda.device(inputs[0].device):
        for _ in range(_WARM_UP):
            call(*inputs)
        torch.cuda.synchronize()
        others = torch.cuda.memory_allocated() - _held(module)
        torch.cuda.reset_peak_memory_stats()
        seconds = sorted(_seconds(call, inputs) for _ in range(_PASSES))
        peak = torch.cuda.max_memory_allocated() - others
    median = statistics.median(seconds)
    return Timing(median, seconds[-1], inputs[0].shape[0] / median, peak)


def _held(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _seconds(call: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call(*inputs)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
