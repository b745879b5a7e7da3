"""Compilation of the kernels that an operation would launch on a named GPU, on a machine without one.

Inside :func:`record_launches` every operation takes the kernels' path with ordinary CPU tensors; each launch is
recorded instead of run, and can be compiled for the named device through Triton's own just-in-time path, with the same
specialisation of arguments as on the GPU. Outputs are left unwritten.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton._C.libtriton import ir, passes
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from gpukern.runtime.current_device import pretend
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.mode import EMULATE, Mode, force_mode


@dataclass(frozen=True, eq=False)
class Launch:
    """A recorded launch: its arguments, and the device it was meant for."""

    function: JITFunction
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    device: DeviceSpec

    @property
    def kernel(self) -> str:
        return self.function.__name__

    @functools.cached_property
    def key(self) -> tuple[str, ...]:
        """Key equal for launches that share one compiled kernel: the types and values that Triton compiles in."""
        with _target(self.device):
            *_, binder = self.function.device_caches[driver.active.get_current_device()]
            _, specialization, options = binder(*self.arguments, **self.options)
        return self.kernel, *map(str, specialization), *(f"{name}={options[name]}" for name in sorted(options))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of everything the compiled code depends on, with the kernel's source, the architecture and Triton."""
        everything = (triton.__version__, self.device.compute_capability, self.function.cache_key, self.key)
        return hashlib.sha256(repr(everything).encode()).hexdigest()

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of the tensors and descriptors, in order."""
        return tuple(_dtypes(self.arguments))

    def first_ir(self) -> str:
        """Text of the kernel in Triton's first representation, its functions inlined, which takes milliseconds.

        That is TTIR, or TTGIR of a kernel in Gluon. Everything that compile-time arguments decide is decided in it.
        """
        with _target(self.device):
            function = self.function
            *_, target, backend, binder = function.device_caches[driver.active.get_current_device()]
            bound, specialization, options = binder(*self.arguments, **self.options)
            parsed, signature, constants, attributes = function._pack_args(
                backend, self.options, bound, specialization, options
            )
            source = function.ASTSource(function, signature, constants, attributes)
            parsed = backend.parse_options(parsed.__dict__ | source.parse_options())
            context = ir.context()
            ir.load_dialects(context)
            backend.load_dialects(context)
            helpers = backend.get_codegen_implementation(parsed)
            module = source.make_ir(target, parsed, helpers, backend.get_module_map(), context)
            inline = ir.pass_manager(context)
            passes.common.add_inliner(inline)
            inline.run(module, "inline")
            return module.str_nodebug()

    def compile(self) -> CompiledKernel:
        with _target(self.device):
            return self.function.run(*self.arguments, grid=self.grid, warmup=True, **self.options)


def _dtypes(argument: Any) -> Iterator[str]:
    if isinstance(argument, tuple):
        for part in argument:
            yield from _dtypes(part)
    else:
        # A descriptor, Triton's or Gluon's, holds its tensor as ``base``.
        tensor = getattr(argument, "base", argument) if hasattr(argument, "block_shape") else argument
        if hasattr(tensor, "data_ptr"):
            yield str(tensor.dtype).removeprefix("torch.")


@contextlib.contextmanager
def record_launches(device: DeviceSpec, receive: Callable[[Launch], None] | None = None) -> Iterator[list[Launch]]:
    """Record the launches of the operations called inside, as ``device`` would get them.

    ``receive`` gets each launch instead of the list, which holds on to all tensors: autograd copies a gradient that
    somebody else holds.
    """
    if EMULATE:
        raise RuntimeError(
            "GPUKERN_EMULATE=1 replaces Triton's compiler by its interpreter; compile in another process"
        )
    launches: list[Launch] = []
    receive = receive or launches.append
    run = JITFunction.run

    def record(self, *args, grid, warmup, **options):
        if warmup:
            return run(self, *args, grid=grid, warmup=warmup, **options)
        arguments, by_position = _split(self, args)
        receive(Launch(self, tuple(grid), arguments, by_position | options, device))
        return None

    JITFunction.run = record
    try:
        with force_mode(Mode.KERNELS), pretend(device):
            yield launches
    finally:
        JITFunction.run = run


def _split(function: JITFunction, arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split the arguments of the launch from the compile-time ones that follow, by name."""
    count = next((i for i, parameter in enumerate(function.params) if parameter.is_constexpr), len(arguments))
    return arguments[:count], dict(zip(function.arg_names[count:], arguments[count:], strict=False))


class _CompileOnlyDriver:
    """A stand-in for Triton's driver that answers its queries before a launch, for a device that is not present."""

    def __init__(self, device: DeviceSpec) -> None:
        major, minor = device.compute_capability
        self._target = GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> tuple:
        # Triton caches compiled kernels by device: one entry per architecture.
        return ("compile only", self._target.arch)

    def get_current_stream(self, device: object) -> int:
        return 0


@contextlib.contextmanager
def _target(device: DeviceSpec) -> Iterator[None]:
    # Not driver.reset_active(): it looks for a real driver and fails if there is none.
    before = driver._active
    driver.set_active(_CompileOnlyDriver(device))
    try:
        yield
    finally:
        driver._active = before
