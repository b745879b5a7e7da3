"""Compiles what an operation would launch on a named GPU, on a machine that has none.

Inside :func:`record_launches` every operation takes the kernels' path with ordinary CPU tensors; each launch is
recorded instead of run, and can be compiled for the named device through Triton's own just-in-time path, with the same
specialisation of arguments as on the GPU. Outputs are left unwritten.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from gpukern.runtime.current_device import pretend
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.mode import EMULATE, Mode, force_mode


@dataclass(frozen=True)
class Launch:
    """One launch that was recorded: the kernel's name, arguments and compile-time options, and how to compile it."""

    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    compile: Callable[[], CompiledKernel]

    @property
    def key(self) -> tuple:
        """Equal for launches that share one compiled kernel."""
        options = tuple(sorted((name, str(value)) for name, value in self.options.items()))
        return self.kernel, _specialisation(self.arguments), options

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of the tensors, in order."""
        return tuple(_dtypes(self.arguments))


def _dtypes(argument: Any) -> Iterator[str]:
    if isinstance(argument, tuple):
        for part in argument:
            yield from _dtypes(part)
    elif hasattr(argument, "data_ptr"):
        yield str(argument.dtype).removeprefix("torch.")


def _specialisation(argument: Any) -> Any:
    """What Triton compiles in of an argument: types, integers that are 1 or a multiple of 16 or wide."""
    if isinstance(argument, tuple):
        return tuple(_specialisation(part) for part in argument)
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, abs(argument) >= 2**31
    if hasattr(argument, "data_ptr"):
        return str(argument.dtype), argument.data_ptr() % 16 == 0
    return type(argument).__name__


@contextlib.contextmanager
def record_launches(device: DeviceSpec) -> Iterator[list[Launch]]:
    """Record the launches of the operations called inside, as ``device`` would get them."""
    if EMULATE:
        raise RuntimeError(
            "GPUKERN_EMULATE=1 replaces Triton's compiler by its interpreter; compile in another process"
        )
    launches: list[Launch] = []
    run = JITFunction.run

    def record(self, *args, grid, warmup, **options):
        def compile() -> CompiledKernel:
            with _target(device):
                return run(self, *args, grid=grid, warmup=True, **options)

        launches.append(Launch(self.__name__, tuple(grid), args, options, compile))

    JITFunction.run = record
    try:
        with force_mode(Mode.KERNELS), pretend(device):
            yield launches
    finally:
        JITFunction.run = run


class _CompileOnlyDriver:
    """What Triton asks a driver before a launch, answered for a device that is not there."""

    def __init__(self, device: DeviceSpec) -> None:
        major, minor = device.compute_capability
        self._target = GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> tuple:
        # Triton keeps compiled kernels by device: one entry for each architecture.
        return ("compile only", self._target.arch)

    def get_current_stream(self, device: object) -> int:
        return 0


@contextlib.contextmanager
def _target(device: DeviceSpec) -> Iterator[None]:
    # Not driver.reset_active(): that looks for a real driver and fails where there is none.
    before = driver._active
    driver.set_active(_CompileOnlyDriver(device))
    try:
        yield
    finally:
        driver._active = before
