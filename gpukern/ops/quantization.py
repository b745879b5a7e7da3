"""Rounding of a tensor to 8 bits with one scale, and the way back, for inference."""

from __future__ import annotations

import torch

from gpukern.runtime.eight_bits import check_scale, in_8_bits
from gpukern.runtime.integers import require
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import Operator
from gpukern.runtime.tensors import KERNEL_DTYPES, elementwise_like

_implementations = Implementations("gpukern.ops._quantize")


def _check_quantize(input: torch.Tensor, scale: float, dtype: torch.dtype) -> None:
    require(
        input.dtype in KERNEL_DTYPES,
        f"quantize: expected a tensor in float32, float16 or bfloat16, but got {input.dtype}",
    )
    if not in_8_bits(dtype):
        raise NotImplementedError(f"quantize: expected a result in int8 or float8_e4m3fn, but got {dtype}")
    check_scale("quantize", scale)


def _quantize(input: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    _check_quantize(input, scale, dtype)
    return _implementations.of(input).quantize(input, scale, dtype)


def _quantize_fake(input, scale, dtype) -> torch.Tensor:
    _check_quantize(input, scale, dtype)
    return elementwise_like(input).to(dtype)


def _check_dequantize(input: torch.Tensor, scale: float, dtype: torch.dtype) -> None:
    require(in_8_bits(input.dtype), f"dequantize: expected a tensor in int8 or float8_e4m3fn, but got {input.dtype}")
    if dtype not in KERNEL_DTYPES:
        raise NotImplementedError(f"dequantize: expected a result in float32, float16 or bfloat16, but got {dtype}")
    check_scale("dequantize", scale)


def _dequantize(input: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    _check_dequantize(input, scale, dtype)
    return _implementations.of(input).dequantize(input, scale, dtype)


def _dequantize_fake(input, scale, dtype) -> torch.Tensor:
    _check_dequantize(input, scale, dtype)
    return elementwise_like(input).to(dtype)


#: ``q = x · (1 / scale)`` of a tensor of any shape in float32, float16 or bfloat16, computed in fp32 and rounded once,
#: to nearest even, to ``dtype``: int8, saturating at ±127, or float8_e4m3fn, at ±448; a NaN is 0 in int8.
#: The result is laid out as torch's element-wise results are. RuntimeError for another dtype (NotImplementedError for
#: that of the result) and for a scale that is not a positive number. No derivative.
quantize = Operator(
    "quantize",
    "(Tensor input, float scale, ScalarType dtype) -> Tensor",
    forward=_quantize,
    fake=_quantize_fake,
)

#: ``x = q · scale`` of a tensor of any shape in int8 or float8_e4m3fn, computed in fp32 and rounded once to ``dtype``:
#: float32, float16 or bfloat16. Layout and errors are those of :data:`quantize`.
dequantize = Operator(
    "dequantize",
    "(Tensor input, float scale, ScalarType dtype) -> Tensor",
    forward=_dequantize,
    fake=_dequantize_fake,
)
