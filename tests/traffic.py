"""Bytes that emulated kernels read and write: every address of an access once, nothing where a mask leaves it out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder


class Traffic:
    def __init__(self) -> None:
        self.read = self.written = 0

    @property
    def total(self) -> int:
        return self.read + self.written


@contextlib.contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Count the loads and stores of the emulated kernels that run inside; atomic counters are not among them."""
    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        traffic.read += _bytes(pointers, mask)
        return load(self, pointers, mask, *others)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        traffic.written += _bytes(pointers, mask)
        return store(self, pointers, value, mask, *others)

    with (
        patch.object(InterpreterBuilder, "create_masked_load", counting_load),
        patch.object(InterpreterBuilder, "create_masked_store", counting_store),
    ):
        yield traffic


def _bytes(pointers: Any, mask: Any) -> int:
    # The interpreter's negation of a mask makes numbers of it, which would be taken for indices.
    touched = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)]
    return len(np.unique(touched)) * pointers.get_element_ty().primitive_bitwidth // 8
