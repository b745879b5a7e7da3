"""Patches that make Triton's interpreter compute bfloat16 and TF32 as a GPU does. Used only when emulating.

The interpreter (Triton 3.6 and 3.7) keeps bfloat16 as the raw bits in ``uint16``. Some of its steps are wrong:

- ``tl.dot`` multiplies those bits as integers;
- the cast fp32 → bf16 truncates, where every GPU rounds to nearest, ties to even, and that of integers makes their bits
  those of the number.

All are fixed here, once, so that kernels carry no code for the interpreter and tests need no extra tolerance. And the
user function of ``tl.reduce``, which the interpreter calls for every element, is called for whole slices.
TF32 is in ``emulation_tf32.py``, float8 in ``emulation_float8.py``, words of bytes are in ``emulation_bytes.py``;
``emulation_speed.py`` makes the interpreter several times faster.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, ReduceOps, TensorHandle

from gpukern.runtime import emulation_bytes, emulation_float8, emulation_speed, emulation_tf32


def bf16_bits_to_fp32(bits: np.ndarray) -> np.ndarray:
    """The exact fp32 values of bfloat16 bit patterns (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16_bits(values: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns (uint16) nearest to fp32 ``values``, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    # A NaN whose payload lies in the low half would round to infinity: keep its top bits and make it quiet.
    quiet_nan = (bits >> 16) | 0x0040
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)


@functools.cache
def prepare() -> None:
    """Patch the interpreter. Raise RuntimeError if Triton was imported before emulation was requested."""
    if not isinstance(tl.cdiv, InterpretedFunction):
        raise RuntimeError(
            "Triton was imported before gpukern, without TRITON_INTERPRET=1, so its interpreter is off: "
            "set GPUKERN_EMULATE=1 and import gpukern first"
        )
    emulation_tf32.prepare()
    emulation_speed.prepare()
    plain_cast, plain_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self, src: TensorHandle, dst_type) -> TensorHandle:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.float32 and target == tl.bfloat16:
            return TensorHandle(fp32_to_bf16_bits(src.data), target)
        if source == tl.bfloat16 and target == tl.float32:
            return TensorHandle(bf16_bits_to_fp32(src.data), target)
        if source.is_int() and target == tl.bfloat16:  # of 8 bits: exact
            return TensorHandle(fp32_to_bf16_bits(src.data.astype(np.float32)), target)
        return plain_cast(self, src, dst_type)

    def create_dot(self, a: TensorHandle, b: TensorHandle, *args) -> TensorHandle:
        return plain_dot(self, _without_bf16(a), _without_bf16(b), *args)

    plain_asm = InterpreterBuilder.create_inline_asm

    def create_inline_asm(self, assembly, constraints, values, types, *rest) -> Any:
        if "// int8 to " not in assembly:
            return plain_asm(self, assembly, constraints, values, types, *rest)
        return emulation_tf32.Results([self.cast_impl(values[0], types[0])])

    plain_patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope) -> None:
        plain_patch(tensor, scope)
        # Triton 3.6 converts an array of one element, which NumPy refuses from 2.4 on.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.create_inline_asm = create_inline_asm
    emulation_bytes.prepare()
    emulation_float8.prepare()
    ReduceOps.generic_reduce = _reduce_slices


def _reduce_slices(self: ReduceOps, input: tuple) -> list:
    """Combine the slices of the axis one after the other, in the order in which the interpreter's own loop does."""
    tensors, axis = self.unravel(input, self.axis)
    arrays = [tensor.handle.data for tensor in tensors]

    def part(i: int) -> tuple:
        return tuple(
            self.to_tensor(np.take(array, i, axis=axis), tensor.dtype)
            for array, tensor in zip(arrays, tensors, strict=True)
        )

    total = part(0)
    for i in range(1, arrays[0].shape[axis]):
        found = self.combine_fn.fn(*total, *part(i))
        total = found if isinstance(found, tuple) else (found,)
    results = []
    for tensor, array, given in zip(total, arrays, input, strict=True):
        data = tensor.handle.data
        if self.keep_dims:
            data = np.expand_dims(data, axis) if self.axis is not None else np.reshape(data, (1,) * array.ndim)
        elif self.axis is None:
            data = data.item()
        results.append(self.to_tensor(data, given.dtype))
    return results


def _without_bf16(operand: TensorHandle) -> TensorHandle:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    return TensorHandle(bf16_bits_to_fp32(operand.data), tl.float32)
