"""The one place from which kernels are launched."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton.language as tl

from gpukern.runtime.mode import EMULATE


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
    """Run ``kernel`` over ``grid`` on ``device`` and its current stream.

    Every launch happens under its tensors' own device: Triton launches on the current one, whatever the tensors say.
    """
    with _on(device, arguments):
        kernel[grid](*arguments, **options)


def _on(device: torch.device, arguments: tuple[Any, ...]) -> contextlib.AbstractContextManager:
    if device.type == "cuda":
        return _NOTHING if device.index == torch.cuda.current_device() else torch.cuda.device(device)
    if EMULATE:
        from gpukern.runtime.emulation_checks import only_memory_of

        return only_memory_of(arguments)
    return _NOTHING


_NOTHING = contextlib.nullcontext()


def index_type(largest_offset: int) -> tl.dtype:
    """The integer type for offsets up to ``largest_offset`` elements, masked lanes beyond the end included."""
    # Blocks may reach past the end of a tensor by far less than 2²⁴ elements before their mask holds.
    return tl.int32 if largest_offset < 2**31 - 2**24 else tl.int64


def reach(*tensors: torch.Tensor) -> int:
    """The largest offset, in elements, between two elements of any one of ``tensors``."""
    return max(sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) for t in tensors)
