"""Inline assembly of bytes in words for Triton's interpreter, which has none. Used only when emulating.

See ``gpukern/conv/families/depthwise/functions.py``.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from gpukern.runtime.emulation_tf32 import Results


def dot_of_bytes(a: np.ndarray, b: np.ndarray, total: np.ndarray | int = 0) -> np.ndarray:
    """``total`` plus the products of the four signed bytes of each int32: ``dp4a.s32.s32``."""
    bytes_a, bytes_b = (np.ascontiguousarray(each)[..., None].view(np.int8).astype(np.int32) for each in (a, b))
    return total + (bytes_a * bytes_b).sum(-1, dtype=np.int32)


def words_of_bytes(*tiles: np.ndarray) -> np.ndarray:
    """The int8 of four tiles as the bytes of one of int32, the first the lowest."""
    return np.stack(tiles, -1).astype(np.int8).view(np.int32)[..., 0]


def prepare() -> None:
    """Patch the interpreter."""
    plain = InterpreterBuilder.create_inline_asm

    def create_inline_asm(self, assembly, constraints, values, *rest) -> Results:
        found = [value.data for value in values]
        if assembly.startswith("dp4a.s32.s32 "):
            return Results([TensorHandle(dot_of_bytes(*found), tl.int32)])
        if assembly.startswith("// four tiles of bytes"):
            return Results([TensorHandle(words_of_bytes(*found), tl.int32)])
        return plain(self, assembly, constraints, values, *rest)

    InterpreterBuilder.create_inline_asm = create_inline_asm
