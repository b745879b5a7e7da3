"""The one place from which kernels are launched."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
    """Run ``kernel`` over ``grid`` on ``device`` and its current stream.

    Every launch happens under its tensors' own device: Triton launches on the current one, whatever the tensors say.
    """
    with _on(device):
        kernel[grid](*arguments, **options)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
