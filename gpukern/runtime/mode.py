"""Choice of a tensor's implementation: the kernels, the emulated kernels, or the plain-torch reference.

====================================================  =========  ==================================================
tensors                                               mode       what runs
====================================================  =========  ==================================================
CUDA                                                  kernels    gpukern's Triton kernels
CPU                                                   reference  plain torch with the same semantics
CPU, ``GPUKERN_EMULATE=1`` set before the import      emulated   the same Triton kernels in Triton's interpreter
====================================================  =========  ==================================================
"""

from __future__ import annotations

import contextlib
import enum
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

#: True when ``GPUKERN_EMULATE`` was set (to anything but 0) before gpukern was imported.
EMULATE = os.environ.get("GPUKERN_EMULATE", "") not in ("", "0")
if EMULATE:
    # Triton decides when a kernel is decorated, and its own library is decorated on import: set it before both.
    os.environ["TRITON_INTERPRET"] = "1"
#: Whether emulated kernels round fp32 to TF32 where a GPU does. Off, since torch multiplies in full fp32 on a CPU
#: whatever its flags allow; the tests switch it on.
EMULATE_TF32 = os.environ.get("GPUKERN_EMULATE_TF32", "") not in ("", "0")


class Mode(enum.Enum):
    KERNELS = "kernels"
    EMULATED = "emulated"
    REFERENCE = "reference"


#: Members of an enumeration are slow to look up, and every call needs these.
_KERNELS, _REFERENCE = Mode.KERNELS, Mode.REFERENCE

_forced: Mode | None = None


@contextlib.contextmanager
def force_mode(mode: Mode) -> Iterator[None]:
    """Compute every tensor by ``mode`` inside the block. For tests and tools that compare implementations."""
    global _forced
    before, _forced = _forced, mode
    try:
        yield
    finally:
        _forced = before


def mode_of(tensor: torch.Tensor) -> Mode:
    """Return the mode of operations on ``tensor``."""
    if _forced is not None:
        return _forced
    if tensor.is_cuda:
        if EMULATE:
            raise RuntimeError("GPUKERN_EMULATE=1 runs the kernels on CPU tensors, but got a CUDA tensor; unset it")
        return _KERNELS
    if EMULATE and tensor.device.type == "cpu":
        return Mode.EMULATED
    return _REFERENCE


def has_triton() -> bool:
    """Whether Triton can be imported (without importing it)."""
    return importlib.util.find_spec("triton") is not None


class Implementations:
    """The two implementations of one operation: ``reference`` and, imported at the first need, ``launch``.

    Both modules of ``package`` offer functions of the same names and signatures, and both compute in the dtypes that
    they are given: autocast was applied before, in the public function.
    """

    def __init__(self, package: str) -> None:
        self._package = package
        self._reference = _WithoutAutocast(importlib.import_module(f"{package}.reference"))
        self._launch: ModuleType | None = None

    def of(self, tensor: torch.Tensor) -> Any:
        if mode_of(tensor) is _REFERENCE:
            return self._reference
        return self._launch or self._import_launch()

    def _import_launch(self) -> ModuleType:
        if not has_triton():
            raise RuntimeError(
                "gpukern's kernels need Triton, which is not installed: pip install triton (Linux). "
                "Without it gpukern runs in reference mode, on CPU tensors only."
            )
        self._launch = importlib.import_module(f"{self._package}.launch")
        return self._launch


class _WithoutAutocast:
    """The functions of a ``reference`` module, which alone calls operators that autocast changes, without it."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._module, name)
        if not torch._C._is_any_autocast_enabled():
            return function
        return functools.partial(_without_autocast, function)


def _without_autocast(function: Callable[..., Any], *arguments: Any) -> Any:
    device = next((each.device.type for each in arguments if isinstance(each, torch.Tensor)), None)
    if device is None:
        return function(*arguments)
    with torch.autocast(device, enabled=False):
        return function(*arguments)
