"""The one place from which kernels are launched."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl

from gpukern.runtime.mode import EMULATE
from gpukern.runtime.refusal import DescriptorRefused

if EMULATE:
    from gpukern.runtime import emulation

    emulation.prepare()

#: Triton's message, from 3.6 on, if the driver makes no tensor map of a descriptor: before the launch.
_REFUSAL = "Failed to create tensor map descriptor"


class CompileTime(NamedTuple):
    """Compile-time arguments in the form that is fastest to pass on; made by :func:`compile_time`."""

    values: tuple[Any, ...]
    keywords: dict[str, Any]


def compile_time(kernel: Any, options: dict[str, Any]) -> CompileTime:
    """Prepare ``options`` of :func:`launch` for repeated launches: those of the kernel's signature by position.

    Two dozen keywords take a third of a microsecond more in every call. ``options`` must have all compile-time
    arguments of ``kernel``, and these follow all others in its signature. ValueError otherwise.
    """
    names = [name for name in kernel.arg_names if name in options]
    if names != kernel.arg_names[len(kernel.arg_names) - len(names) :]:
        raise ValueError(f"{kernel.__name__}: the compile-time arguments are not the last ones, or not all there")
    keywords = {name: value for name, value in options.items() if name not in names}
    return CompileTime(tuple(options[name] for name in names), _ALWAYS | keywords)


#: Multiplications and additions are fused unless a kernel's options say otherwise: Triton 3.9 expects the option, 3.10
#: does not fuse without.
_ALWAYS = {"warmup": False, "enable_fp_fusion": True}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    arguments: tuple[Any, ...],
    options: CompileTime | dict[str, Any],
) -> None:
    """Run ``kernel`` over ``grid`` on ``device`` and its current stream.

    ``options`` are compile-time arguments and Triton's own (``num_warps``, ``num_stages``), in one of two forms.

    ``kernel.run`` is what ``kernel[grid]`` calls: packing two dozen keywords once more costs a microsecond a call.

    Every launch happens under its tensors' own device: Triton launches on the current one, wherever the tensors are.
    DescriptorRefused if the driver rejects a descriptor among the arguments.
    """
    values, keywords = options if type(options) is CompileTime else ((), _ALWAYS | options)  # type: ignore[operator]
    try:
        # Tensors have a numbered device on GPUs only, and device.type would make a string in every call.
        if device.index is not None:
            if device.index != torch.cuda.current_device():
                with torch.cuda.device(device):
                    kernel.run(*arguments, *values, **keywords, grid=grid)
                return
        elif EMULATE:
            from gpukern.runtime.emulation_checks import only_memory_of
            from gpukern.runtime.emulation_tf32 import descriptors_round

            with only_memory_of(arguments), descriptors_round(arguments):
                kernel.run(*arguments, *values, **keywords, grid=grid)
            return
        kernel.run(*arguments, *values, **keywords, grid=grid)
    except RuntimeError as problem:
        if _REFUSAL in str(problem):
            raise DescriptorRefused(str(problem)) from problem
        raise


def index_type(largest_offset: int) -> tl.dtype:
    """The integer type for offsets up to ``largest_offset`` elements, masked elements beyond the end included."""
    # Blocks may reach past the end of a tensor by far less than 2²⁴ elements before their mask holds.
    return tl.int32 if largest_offset < 2**31 - 2**24 else tl.int64
