"""Average pools that read 8 bits: float8_e4m3fn or int8, ``x ≈ input_scale · q``. For inference: without gradients.

The maximum of 8-bit values is that of :mod:`gpukern.ops.pool2d`: it keeps the scale.
"""

from __future__ import annotations

import torch

from gpukern.ops._pool2d.problem import Pair, adaptive_problem, check_adaptive, output_size, pool_problem
from gpukern.runtime.eight_bits import check_quantizable, check_scale, in_8_bits
from gpukern.runtime.integers import require
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import Operator
from gpukern.runtime.tensors import memory_format_of
from gpukern.runtime.transforms import Batch

_implementations = Implementations("gpukern.ops._pool2d")

_BATCH = Batch(images=(0,))
#: Sums of so many int8 values fit 32 bits.
_MOST_VALUES = 2**24


def _check(
    operation: str,
    input: torch.Tensor,
    input_scale: float,
    output_scale: float,
    output_dtype: torch.dtype,
    values: int,
) -> None:
    if not in_8_bits(input.dtype):
        raise NotImplementedError(f"{operation}: expected an input in int8 or float8_e4m3fn, but got {input.dtype}")
    check_scale(operation, input_scale, "input_scale")
    check_quantizable(operation, output_scale, output_dtype, "output_scale")
    require(values <= _MOST_VALUES, f"{operation}: a window of {values} values is too large for sums in 32 bits")


def _adaptive(
    input: torch.Tensor, input_scale: float, size: Pair, output_scale: float, output_dtype: torch.dtype
) -> torch.Tensor:
    _check_adaptive(input, input_scale, size, output_scale, output_dtype)
    problem = adaptive_problem(input.shape, size)
    return _implementations.of(input).avg_pool2d_quantized(
        problem, input, memory_format_of(input), input_scale, output_scale, output_dtype
    )


def _check_adaptive(input, input_scale, size, output_scale, output_dtype) -> None:
    require(
        input.dim() == 4 and len(size) == 2,
        f"adaptive_avg_pool2d_quantized: expected an input [N, C, H, W] and a size [P, Q], but got {list(input.shape)} "
        f"and {list(size)}",
    )
    check_adaptive(input.shape, size)
    values = (input.shape[2] // max(size[0], 1) + 2) * (input.shape[3] // max(size[1], 1) + 2)
    _check("adaptive_avg_pool2d_quantized", input, input_scale, output_scale, output_dtype, values)


def _adaptive_fake(input, input_scale, size, output_scale, output_dtype) -> torch.Tensor:
    _check_adaptive(input, input_scale, size, output_scale, output_dtype)
    return _empty(input, (*input.shape[:2], *size), output_dtype)


#: ``y[p, q] = (Σ q) · (input_scale / count)`` over the window of :func:`gpukern.functional.adaptive_avg_pool2d`.
#:
#: The sum of int8 values is exact, in int32, that of float8_e4m3fn in fp32; product and quotient are rounded to fp32.
#: The result is rounded once more, to ``output_dtype``: as y / output_scale to int8 or float8_e4m3fn, at most 127 or
#: 448 in magnitude, NaN being 0 in int8; as it is to float16, bfloat16 or float32, whose ``output_scale`` is 1.
#: RuntimeError for sizes or scales that do not fit, NotImplementedError for other dtypes, and for float8_e4m3fn on a
#: GPU before compute capability 8.9.
adaptive_avg_pool2d_quantized = Operator(
    "adaptive_avg_pool2d_quantized",
    "(Tensor input, float input_scale, int[] output_size, float output_scale, ScalarType output_dtype) -> Tensor",
    forward=_adaptive,
    fake=_adaptive_fake,
    batch=_BATCH,
)


def _windowed(
    input: torch.Tensor,
    input_scale: float,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    output_scale: float,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    geometry = kernel, stride, padding, (1, 1), ceil_mode
    problem = pool_problem(input.shape, *geometry, count_include_pad, divisor_override)
    _check("avg_pool2d_quantized", input, input_scale, output_scale, output_dtype, kernel[0] * kernel[1])
    return _implementations.of(input).avg_pool2d_quantized(
        problem, input, memory_format_of(input), input_scale, output_scale, output_dtype
    )


def _windowed_fake(input, input_scale, kernel, stride, padding, ceil_mode, include, override, scale, dtype):
    require(override != 0, "divisor_override must not be zero")
    size = output_size(input.shape, kernel, stride, padding, (1, 1), ceil_mode)
    _check("avg_pool2d_quantized", input, input_scale, scale, dtype, kernel[0] * kernel[1])
    return _empty(input, (*input.shape[:2], *size), dtype)


#: As :data:`adaptive_avg_pool2d_quantized`, over the windows, and with the divisors, of
#: :func:`gpukern.functional.avg_pool2d`.
avg_pool2d_quantized = Operator(
    "avg_pool2d_quantized",
    "(Tensor input, float input_scale, int[] kernel, int[] stride, int[] padding, bool ceil_mode, "
    "bool count_include_pad, int? divisor_override, float output_scale, ScalarType output_dtype) -> Tensor",
    forward=_windowed,
    fake=_windowed_fake,
    batch=_BATCH,
)


def _empty(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format_of(like))
