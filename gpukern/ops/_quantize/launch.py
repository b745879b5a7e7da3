"""Rounding to 8 bits and back by the kernels, in functions of the same names and signatures as ``reference.py``."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from gpukern.ops._images import Image
from gpukern.ops._quantize import kernels
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.eight_bits import check_float8, inverse
from gpukern.runtime.integers import cdiv
from gpukern.runtime.launcher import index_type, launch
from gpukern.runtime.strides import joined, reach
from gpukern.runtime.tensors import elementwise_like

#: 16 elements for each thread of 4 warps: a store of 16 bytes of an 8-bit result.
_BLOCK = 2048


def quantize(input: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    check_float8(dtype, device_spec(input.device))
    return _convert(kernels.quantize_kernel, input, dtype, inverse(scale))


def dequantize(input: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    check_float8(input.dtype, device_spec(input.device))
    return _convert(kernels.dequantize_kernel, input, dtype, scale)


def _convert(kernel: Any, input: torch.Tensor, dtype: torch.dtype, factor: float) -> torch.Tensor:
    output = elementwise_like(input, dtype)
    size = output.numel()
    if not size:
        return output
    path = _walk(tuple(output.shape), output.stride(), input.stride())
    if path is None:
        input = elementwise_like(input).copy_(input)
        path = _FLAT
    launch(
        kernel,
        (cdiv(size, _BLOCK),),
        output.device,
        (Image(input, *path.strides), output, path.sizes, size, factor),
        {"FLAT": path is _FLAT, "BLOCK": _BLOCK, "INDEX": index_type(max(size, path.reach)), "num_warps": 4},
    )
    return output


class _Walk(NamedTuple):
    """A walk through the result's memory: four ``sizes``, the input's ``strides`` along them, its largest offset."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    reach: int


#: Input and result lie in one order, without a gap.
_FLAT = _Walk((1,) * 4, (0,) * 4, 0)


@functools.lru_cache(maxsize=4096)
def _walk(shape: tuple[int, ...], output: tuple[int, ...], input: tuple[int, ...]) -> _Walk | None:
    """Return None where more than four dimensions are left that cannot be joined."""
    order = sorted(range(len(shape)), key=lambda i: -output[i])
    sizes, (strides,) = joined([shape[i] for i in order], [[input[i] for i in order]])
    if len(sizes) > 4:
        return None
    if not sizes or strides == [1]:
        return _FLAT
    missing = 4 - len(sizes)
    return _Walk((1,) * missing + tuple(sizes), (0,) * missing + tuple(strides), reach(sizes, strides))
