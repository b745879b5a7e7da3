"""TF32 in the interpreter, which always multiplies in fp32: operands are truncated or rounded as by tensor cores.

With ``GPUKERN_EMULATE_TF32=1``, set before the import; without it fp32 is multiplied in full, as torch does on a CPU.

- ``tl.dot`` of fp32 with ``input_precision="tf32"``: the low 13 bits of both operands are truncated;
- with ``"tf32x3"``: three products of rounded halves, as Triton makes them;
- ``cvt.rna.tf32.f32`` in inline assembly, and loads through a descriptor that rounds.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

from gpukern.runtime.mode import EMULATE_TF32

_LOW = np.uint32(0x1FFF)

#: Which of a launch's descriptors round, in the order in which the interpreter takes them.
_rounding: list[bool] = []


def cut_to_tf32(values: np.ndarray) -> np.ndarray:
    """fp32 ``values`` without their low 13 bits; NaN stays NaN, whatever its bits."""
    cut = (_bits(values) & ~_LOW).view(np.float32)
    return np.where(np.isnan(values), values, cut)


def round_to_tf32(values: np.ndarray) -> np.ndarray:
    """The nearest TF32 of fp32 ``values``, ties away from zero; infinity and NaN stay what they are."""
    rounded = ((_bits(values) + np.uint32(0x1000)) & ~_LOW).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)


@contextlib.contextmanager
def descriptors_round(arguments: tuple[Any, ...]) -> Iterator[None]:
    """Inside the block, loads through those descriptors of a launch's ``arguments`` that round do so.

    The interpreter converts them into its own descriptors, which have no rounding.
    """
    _rounding[:] = [getattr(descriptor, "round_f32_to_tf32", False) for descriptor in _descriptors(arguments)]
    try:
        yield
    finally:
        _rounding.clear()


def _descriptors(argument: Any) -> Iterator[TensorDescriptor]:
    if isinstance(argument, TensorDescriptor):
        yield argument
    elif isinstance(argument, tuple):
        for part in argument:
            yield from _descriptors(part)


@functools.cache
def prepare() -> None:
    """Patch the interpreter."""
    plain_dot, plain_load = InterpreterBuilder.create_dot, InterpreterBuilder.create_descriptor_load
    plain_descriptor = InterpreterBuilder.create_make_tensor_descriptor

    def create_dot(self, a: TensorHandle, b: TensorHandle, acc: TensorHandle, precision, *rest) -> TensorHandle:
        def product(x, y, z) -> TensorHandle:
            return plain_dot(self, TensorHandle(x, tl.float32), TensorHandle(y, tl.float32), z, precision, *rest)

        if not EMULATE_TF32 or not a.dtype.scalar == b.dtype.scalar == tl.float32:
            return plain_dot(self, a, b, acc, precision, *rest)
        if precision == ir.INPUT_PRECISION.TF32:
            return product(cut_to_tf32(a.data), cut_to_tf32(b.data), acc)
        if precision == ir.INPUT_PRECISION.TF32x3:
            (high, low), (other_high, other_low) = _halves(a.data), _halves(b.data)
            small = product(low, other_high, TensorHandle(np.zeros_like(acc.data), tl.float32))
            small = product(high, other_low, small).data
            # For infinities the difference of their halves is NaN; the product of the high halves is right.
            partial = product(high, other_high, TensorHandle(np.where(np.isnan(small), 0, small), tl.float32))
            return TensorHandle(partial.data + acc.data, acc.dtype.scalar)
        return plain_dot(self, a, b, acc, precision, *rest)

    def create_inline_asm(self, assembly, constraints, values, types, pure, pack) -> TensorHandle:
        if not assembly.startswith("cvt.rna.tf32.f32 "):
            raise NotImplementedError(f"emulated inline assembly: {assembly}")
        rounded = round_to_tf32(values[0].data) if EMULATE_TF32 else values[0].data
        return Results([TensorHandle(rounded, tl.float32)])

    def create_make_tensor_descriptor(self, *args, **named):
        descriptor = plain_descriptor(self, *args, **named)
        descriptor.rounds = EMULATE_TF32 and bool(_rounding) and _rounding.pop(0)
        return descriptor

    def create_descriptor_load(self, descriptor, *rest) -> TensorHandle:
        if not EMULATE_TF32:
            descriptor.round_f32_to_tf32 = False  # which Triton 3.9 does by itself
        loaded = plain_load(self, descriptor, *rest)
        return TensorHandle(round_to_tf32(loaded.data), tl.float32) if descriptor.rounds else loaded

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.create_inline_asm = create_inline_asm
    InterpreterBuilder.create_make_tensor_descriptor = create_make_tensor_descriptor
    InterpreterBuilder.create_descriptor_load = create_descriptor_load


class Results(list):
    """The results of an operation, in the compiler's form."""

    def get_result(self, i: int) -> TensorHandle:
        return self[i]


def _halves(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(h, l) with h + l ≈ ``values``, both TF32."""
    high = round_to_tf32(values)
    with np.errstate(invalid="ignore"):
        return high, round_to_tf32(values - high)
