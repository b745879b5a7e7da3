"""Patches that make Triton's interpreter convert float8_e4m3fn as a GPU does. Used only when emulating.

The interpreter (Triton 3.6 and 3.7) keeps its bits in ``uint8``. It reads a NaN as 480, and where it rounds up to the
next power of two it forgets to raise the exponent: 31.3 becomes 16. A GPU rounds to nearest even, and what lies beyond
448 to 448.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_E4M3).max


@functools.cache
def _values() -> np.ndarray:
    """The value of each of the 256 bit patterns."""
    return torch.arange(256).to(torch.uint8).view(_E4M3).float().numpy()


def e4m3_bits_to_fp32(bits: np.ndarray) -> np.ndarray:
    """The exact fp32 values of float8_e4m3fn bit patterns (uint8)."""
    return _values()[bits]


def fp32_to_e4m3_bits(values: np.ndarray) -> np.ndarray:
    """float8_e4m3fn bit patterns (uint8) nearest to fp32 ``values``, ties to even; saturates, NaN is 0x7F."""
    clipped = torch.from_numpy(np.clip(values, -_LARGEST, _LARGEST).astype(np.float32))
    bits = clipped.to(_E4M3).view(torch.uint8).numpy()
    return np.where(np.isnan(values), np.uint8(0x7F), bits)


def prepare() -> None:
    """Patch the interpreter."""
    plain = InterpreterBuilder.create_fp_to_fp

    def create_fp_to_fp(self, src: TensorHandle, dst_type, rounding_mode) -> TensorHandle:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.float8e4nv:
            wide = TensorHandle(e4m3_bits_to_fp32(src.data), tl.float32)
            return wide if target == tl.float32 else self.cast_impl(wide, dst_type)
        if target == tl.float8e4nv:
            wide = src if source == tl.float32 else self.cast_impl(src, tl.float32)
            return TensorHandle(fp32_to_e4m3_bits(wide.data), target)
        return plain(self, src, dst_type, rounding_mode)

    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
