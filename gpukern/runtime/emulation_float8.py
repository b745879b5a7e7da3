"""Patches that make Triton's interpreter round to float8_e4m3fn as a GPU does. Used only when emulating.

The interpreter keeps such numbers as their bits in ``uint8``. Its conversion from fp32 rounds halves away from zero,
loses the carry into the exponent and wraps round beyond the largest number, where GPUs round to nearest even and
saturate (``cvt.rn.satfinite``); that to fp16 in ``tl.dot`` has no NaN.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


@functools.cache
def _values() -> np.ndarray:
    """The fp32 values of all bit patterns."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).numpy()


def bits_to_fp32(bits: np.ndarray) -> np.ndarray:
    """The exact fp32 values of float8_e4m3fn bit patterns (uint8)."""
    return _values()[bits]


def fp32_to_bits(values: np.ndarray) -> np.ndarray:
    """Bit patterns (uint8) nearest to fp32 ``values``, ties to even; infinities saturate, NaN stays NaN."""
    exact = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).clamp(-_LARGEST, _LARGEST)
    return exact.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def prepare() -> None:
    """Patch the interpreter."""
    plain_fp_to_fp, plain_dot = InterpreterBuilder.create_fp_to_fp, InterpreterBuilder.create_dot

    def create_fp_to_fp(self, src: TensorHandle, dst_type, rounding_mode) -> TensorHandle:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.float8e4nv:
            exact = TensorHandle(bits_to_fp32(src.data), tl.float32)
            return exact if target == tl.float32 else self.cast_impl(exact, dst_type)
        if target == tl.float8e4nv:
            exact = src if source == tl.float32 else self.cast_impl(src, tl.float32)
            return TensorHandle(fp32_to_bits(exact.data), target)
        return plain_fp_to_fp(self, src, dst_type, rounding_mode)

    def create_dot(self, a: TensorHandle, b: TensorHandle, *others) -> TensorHandle:
        return plain_dot(self, _without_float8(a), _without_float8(b), *others)

    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.create_dot = create_dot


def _without_float8(operand: TensorHandle) -> TensorHandle:
    if operand.dtype.scalar != tl.float8e4nv:
        return operand
    return TensorHandle(bits_to_fp32(operand.data), tl.float32)
