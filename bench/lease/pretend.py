"""Pretence of an H200 in this process, for dry runs: every line runs, and every time is made up.

Tensors on "cuda" are tensors on "meta", without memory, so nothing computes and every check of a value passes. Triton
is real: kernels come from its cache or its compiler, launchers are its own, and launches go to the stub driver
(:mod:`bench.lease.stub`). What is compiled meanwhile goes to the file that ``LEASE_LOG`` names, a line each:
``hit KERNEL``, ``miss KERNEL`` or ``compiler FILE``.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

NAME = "NVIDIA H200"
META = torch.device("meta")
#: Every GPU time of a dry run, in milliseconds.
_TIME = 1.0


def pretend_gpu() -> None:
    """Pretend a GPU from now on, until the process ends."""
    import triton
    from triton.runtime import build, driver

    from bench import accuracy
    from bench.lease.stub import Stub
    from gpukern.runtime import amp, current_device
    from gpukern.runtime.device import H200, DeviceSpec
    from gpukern.runtime.mode import Mode, force_mode

    triton.knobs.compilation.listener = _on_compiled
    real_build = build._build

    def logged_build(name: str, *given: Any, **options: Any) -> Any:
        _log(f"compiler {name}")
        return real_build(name, *given, **options)

    build._build = logged_build
    driver.set_active(Stub(Path(os.environ["TRITON_LIBCUDA_PATH"])).driver())
    # As a device that is queried for its limits describes itself.
    spec = DeviceSpec(NAME, H200.compute_capability, H200.sm_count, H200.shared_memory)
    _forever(current_device.pretend(spec), force_mode(Mode.KERNELS), _OnMeta())
    accuracy.relative_error = lambda actual, reference: 0.0
    pretended = _Autocast()
    patched: Any = torch
    patched.autocast = pretended.region
    module: Any
    for module in [module for name, module in list(sys.modules.items()) if name.startswith("gpukern.")]:
        if getattr(module, "autocast", None) is amp.autocast:
            module.autocast = pretended.cast
    vars(amp)["autocast"] = pretended.cast
    patched.compile = lambda function=None, **options: function if function is not None else (lambda each: each)
    for name, value in _cuda(spec).items():
        setattr(torch.cuda, name, value)


def _on_compiled(*, src: Any, cache_hit: bool, **others: Any) -> None:
    _log(f"{'hit' if cache_hit else 'miss'} {src.name}")


def _log(line: str) -> None:
    if path := os.environ.get("LEASE_LOG"):
        with open(path, "a") as file:
            file.write(line + "\n")


_kept: list[Any] = []


def _forever(*contexts: Any) -> None:
    for each in contexts:
        each.__enter__()
        _kept.append(each)


class _OnMeta(TorchFunctionMode):
    """Puts tensors requested on "cuda" on "meta", and returns zeros for their values."""

    def __torch_function__(self, function: Any, types: Any, given: tuple = (), options: dict | None = None) -> Any:
        if function is torch.device:
            return function(*given, **(options or {}))
        options = {name: _moved(each) for name, each in (options or {}).items() if name != "generator"}
        given = tuple(_moved(each) for each in given)
        on_meta = bool(given) and isinstance(given[0], torch.Tensor) and given[0].device == META
        if function is torch.equal:
            return True
        if function is torch.allclose:
            return True
        if on_meta and function in (torch.Tensor.item, torch.Tensor.__float__):
            return 0.0
        if on_meta and function in (torch.Tensor.__bool__, torch.Tensor.__int__):
            return 0
        if on_meta and function is torch.Tensor.cpu:
            return torch.zeros(given[0].shape, dtype=given[0].dtype, device="cpu")
        return function(*given, **options)


def _moved(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return META
    return "meta" if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


class _Autocast:
    """Replaces torch's, which refuses tensors on "meta": else kernels would be compiled for another dtype."""

    def __init__(self) -> None:
        self._dtype: torch.dtype | None = None

    @contextlib.contextmanager
    def region(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **options: Any) -> Any:
        before, self._dtype = self._dtype, (dtype or torch.float16) if enabled else None
        try:
            yield
        finally:
            self._dtype = before

    def cast(self, *tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """:func:`gpukern.runtime.amp.autocast`."""
        if self._dtype is None:
            return tensors
        return tuple(
            each.to(self._dtype) if each is not None and each.is_floating_point() else each for each in tensors
        )


#: Results of the methods of a stream, an event or a graph; every other method returns None.
_ANSWERS = {"query": True, "elapsed_time": _TIME, "pool": (0, 0)}


class _Idle:
    """A stream, an event or a graph whose methods do nothing."""

    cuda_stream, stream_id, device = 0, 0, META

    def __init__(self, *given: Any, **options: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **options: _ANSWERS.get(name)


def _cuda(spec: Any) -> dict[str, Any]:
    """Return the replaced functions of ``torch.cuda``."""
    major, minor = spec.compute_capability
    properties = SimpleNamespace(
        name=spec.name,
        major=major,
        minor=minor,
        multi_processor_count=spec.sm_count,
        shared_memory_per_block_optin=spec.shared_memory,
        L2_cache_size=60 * 2**20,
        total_memory=140 * 2**30,
    )

    values = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "synchronize": None,
        "empty_cache": None,
        "get_device_name": spec.name,
        "get_device_properties": properties,
        "get_device_capability": spec.compute_capability,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "is_current_stream_capturing": False,
        "current_stream": _Idle(),
        **dict.fromkeys(("stream", "device", "graph"), contextlib.nullcontext()),
    }
    # A function of its own for each: PyTorch's compiler has one rule for a function, whatever its names.
    functions = {name: lambda *given, value=value, **options: value for name, value in values.items()}
    return functions | {name: type(name, (_Idle,), {}) for name in ("Stream", "Event", "CUDAGraph")}
