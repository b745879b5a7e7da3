"""Timing of a forward pass on a GPU, and its number of kernels."""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from gpukern.fusion.given import duplicate
from gpukern.fusion.report import FusionReport, Timing

if TYPE_CHECKING:
    from gpukern.fusion.model import FusedModel

#: Passes before any is timed: kernels are compiled, and graphs captured.
_WARM_UP = 10
_PASSES = 100


def beside(fused: FusedModel, model: torch.nn.Module, inputs: tuple, channels_last: bool) -> FusionReport:
    """The report of ``fused`` with its timing, and that of ``model`` as it would run unfused: in the same dtype and
    layout. What cannot be timed, for want of memory as a rule, is a note there."""
    told = fused.report.quantization
    dtype = getattr(torch, fused.report.dtype if told is None else told.precision)

    def prepared(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            return leaf
        image = channels_last and leaf.dim() == 4
        return leaf.to(dtype, memory_format=torch.channels_last if image else torch.preserve_format)

    plain_inputs = pytree.tree_map(prepared, inputs)
    try:
        plain = duplicate(model).to(dtype)
        if channels_last:
            plain = plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        before = time_forward(plain, plain_inputs, {}, plain)
        del plain
        after = time_forward(fused, *fused.module.interface.signature.split(plain_inputs), fused.module)
    except RuntimeError as problem:
        return replace(fused.report, notes=(*fused.report.notes, f"Not timed: {problem}"))
    return replace(fused.report, timing_before=before, timing_after=after)


@torch.no_grad()
def time_forward(call: Callable[..., Any], inputs: tuple, named: Mapping[str, Any], module: torch.nn.Module) -> Timing:
    """Time ``call(*inputs, **named)`` on the inputs' CUDA device: the median and worst of 100 passes, one at a time.

    What the host does counts where the device waits for it. Peak memory is that of the passes and the tensors of
    ``module``, whatever else is on the device. Kernels are those of ``module``, be it replayed as a graph or not.
    """
    first = next(leaf for leaf in pytree.tree_leaves((inputs, dict(named))) if isinstance(leaf, torch.Tensor))
    with torch.cuda.device(first.device):
        for _ in range(_WARM_UP):
            call(*inputs, **named)
        torch.cuda.synchronize()
        others = torch.cuda.memory_allocated() - _held(module)
        torch.cuda.reset_peak_memory_stats()
        seconds = sorted(_seconds(call, inputs, named) for _ in range(_PASSES))
        peak = torch.cuda.max_memory_allocated() - others
        kernels = _kernels(module, inputs, named)
    median = statistics.median(seconds)
    return Timing(median, seconds[-1], first.shape[0] / median, peak, kernels)


def _held(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _seconds(call: Callable[..., Any], inputs: tuple, named: Mapping[str, Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call(*inputs, **named)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _kernels(module: torch.nn.Module, inputs: tuple, named: Mapping[str, Any]) -> int | None:
    """Kernels of one pass, without copies and fills; None if the driver does not permit profiling."""
    activities = list(torch.profiler.supported_activities())
    with _silent_process(), torch.profiler.profile(activities=activities) as seen:
        module(*inputs, **named)
        torch.cuda.synchronize()
    on_device = [event for event in seen.events() if event.device_type is torch.autograd.DeviceType.CUDA]
    kernels = [e for e in on_device if not e.is_user_annotation and not e.name.startswith(("Memcpy", "Memset"))]
    return len(kernels) or None


@contextlib.contextmanager
def _silent_process() -> Iterator[None]:
    """Without what libraries write to standard error themselves: the profiler, that it starts and that it stops."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
