"""As much of CuPy as gpukern.optim uses, on a CPU: its kernels run those compiled for the host.

What it checks and copies is what CuPy 14 does, ``cupy/cuda/function.pyx``: an argument that is a NumPy array of one
element is passed by value, whatever its dtype, and CuPy looks only at where it begins.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpukern.optim._fused.codegen import Variant
from gpukern.optim._fused.host import HostProgram


@dataclass
class Launch:
    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    device: int
    stream: int


@dataclass
class TorchStream:
    """torch.cuda.Stream: what is asked of it."""

    cuda_stream: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.cuda_stream


@dataclass
class Nvrtc:
    """``cupy.cuda.nvrtc``, whose programs are their numbers. ``refuses`` is what it says of every text, if anything."""

    sources: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    version: tuple[int, int] = (13, 0)
    refuses: str = ""
    alive: list[int] = field(default_factory=list)

    class NVRTCError(RuntimeError):
        pass

    def getVersion(self) -> tuple[int, int]:
        return self.version

    def getSupportedArchs(self) -> tuple[int, ...]:
        return 75, 80, 90, 100

    def createProgram(self, text: str, name: str, headers: tuple, included: tuple) -> int:
        assert not headers and not included
        self.sources.append((text, ()))
        self.alive.append(len(self.sources))
        return len(self.sources)

    def compileProgram(self, program: int, options: tuple[str, ...]) -> None:
        assert isinstance(options, tuple)
        self.sources[program - 1] = self.sources[program - 1][0], options
        if self.refuses:
            raise self.NVRTCError("NVRTC_ERROR_COMPILATION (6)")

    def getProgramLog(self, program: int) -> str:
        return f"{self.refuses}\n\0"

    def getCUBIN(self, program: int) -> bytes:
        return b"of number %d" % program

    def getPTX(self, program: int) -> bytes:
        return b"PTX of number %d" % program

    def destroyProgram(self, program: int) -> None:
        self.alive.remove(program)


@dataclass
class Stub:
    """``module`` takes CuPy's place. The rest is what it was asked to do."""

    variant: Variant
    current_device: int = 0
    sources: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    loaded: list[tuple[str, int]] = field(default_factory=list)
    wrapped: list[int] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)

    @property
    def module(self) -> types.SimpleNamespace:
        stub = self

        class Device:
            compute_capability = "90"

            def __init__(self, number: int) -> None:
                self._number, self._before = number, []

            def __enter__(self) -> None:
                self._before.append(stub.current_device)
                stub.current_device = self._number

            def __exit__(self, *problem: object) -> None:
                stub.current_device = self._before.pop()

        class Stream:
            @classmethod
            def from_external(cls, other: Any) -> types.SimpleNamespace:
                version, pointer = other.__cuda_stream__()
                assert version == 0
                stub.wrapped.append(pointer)
                return types.SimpleNamespace(ptr=pointer)

        class Module:
            def load(self, cubin: bytes) -> None:
                assert cubin == b"of number %d" % len(stub.sources)

            def get_function(self, name: str) -> Callable[..., None]:
                stub.loaded.append((name, stub.current_device))
                return lambda grid, block, args, *, stream=None: stub._run(name, grid, block, args, stream)

        return types.SimpleNamespace(
            cuda=types.SimpleNamespace(Device=Device, Stream=Stream, Module=Module, nvrtc=Nvrtc(self.sources))
        )

    def _run(self, name: str, grid: tuple, block: tuple, args: tuple, stream: Any) -> None:
        assert isinstance(grid, tuple) and isinstance(block, tuple) and grid[0] > 0
        (given,) = args
        assert isinstance(given, np.ndarray) and given.size == 1
        self.launches.append(Launch(name, grid, block, self.current_device, stream.ptr))
        HostProgram(self.variant).launch(name, grid[0], given.copy())
