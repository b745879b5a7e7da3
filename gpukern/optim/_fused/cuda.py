"""The kernels on a CUDA device, compiled and launched through CuPy."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from gpukern.optim._fused.codegen import THREADS, Variant, kernels, source
from gpukern.optim._fused.nvrtc import machine_code


class DeviceProgram:
    """Kernels on the device with number ``device``, on PyTorch's current stream there."""

    def __init__(self, variant: Variant, device: int) -> None:
        cupy = _cupy()
        self._cupy, self._device = cupy, device
        self._streams: dict[int, Any] = {}
        chosen = cupy.cuda.Device(device)
        with chosen:
            # Loading allocates, which must not happen while a graph is captured: all kernels are loaded here.
            module = cupy.cuda.Module()
            module.load(machine_code(cupy.cuda.nvrtc, source(variant), int(chosen.compute_capability)))
            self._kernels = {name: module.get_function(name) for name in kernels(variant.rule)}

    def launch(self, kernel: str, blocks: int, arguments: np.ndarray) -> None:
        """Launch a kernel. ``arguments`` has one element, passed by value, which may change as soon as this returns."""
        current = torch.cuda.current_stream(self._device)
        # A module belongs to the device that was current when it was loaded.
        with self._cupy.cuda.Device(self._device):
            self._kernels[kernel]((blocks,), (THREADS,), (arguments,), stream=self._stream(current))

    def _stream(self, current: torch.cuda.Stream) -> Any:
        """Wrap the stream for CuPy, which only passes it on: CuPy's current stream does not change."""
        stream = self._streams.get(current.cuda_stream)
        if stream is None:
            stream = self._streams[current.cuda_stream] = self._cupy.cuda.Stream.from_external(current)
        return stream


@functools.cache
def device_program(variant: Variant, device: int) -> DeviceProgram:
    """Load the program once: later parameters, or a loaded state, need their own tables, but no new program."""
    return DeviceProgram(variant, device)


@functools.cache
def _cupy() -> Any:
    try:
        import cupy
    except ImportError as problem:
        package = "cupy-cuda13x" if (torch.version.cuda or "").startswith("13") else "cupy-cuda12x"
        raise RuntimeError(
            f"gpukern.optim updates CUDA parameters by kernels that it launches through CuPy: pip install {package}"
        ) from problem
    return cupy
