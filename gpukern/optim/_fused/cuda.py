"""The kernels on a CUDA device, compiled and launched through CuPy."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from gpukern.optim._fused.source import KERNELS, THREADS, Variant, source

_OPTIONS = ("--std=c++17",)


class DeviceProgram:
    """Kernels on the device with number ``device``, on PyTorch's current stream there."""

    def __init__(self, variant: Variant, device: int) -> None:
        cupy = _cupy()
        self._cupy, self._device = cupy, device
        self._streams: dict[int, Any] = {}
        with cupy.cuda.Device(device), torch.cuda.device(device):
            # Compiled by NVRTC once for each text and architecture: CuPy keeps the result on disk.
            module = cupy.RawModule(code=source(variant), options=_OPTIONS)
            # Loading allocates, which must not happen while a graph is captured.
            self._kernels = {name: module.get_function(name) for name in KERNELS}
            for kernel in self._kernels.values():
                kernel.compile()

    def launch(self, kernel: str, blocks: int, arguments: np.ndarray) -> None:
        current = torch.cuda.current_stream(self._device)
        with self._cupy.cuda.Device(self._device), self._stream(current):
            self._kernels[kernel]((blocks,), (THREADS,), (arguments,))

    def _stream(self, current: torch.cuda.Stream) -> Any:
        pointer = current.cuda_stream
        stream = self._streams.get(pointer)
        if stream is None:
            stream = self._streams[pointer] = self._cupy.cuda.Stream.from_external(current)
        return stream


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
