"""Checks that a GPU does not make: every access and every hint of an emulated kernel.

- A load or store outside the memory of the tensors that were passed to the kernel raises, even where the value is not
  used: on a GPU it would read another tensor or end the program.
- ``tl.multiple_of`` and ``tl.max_constancy`` are promises to the compiler, which reads 16 bytes at once because of
  them. The interpreter ignores them; here a promise that does not hold raises.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

from gpukern.runtime.strides import reach

_allowed: list[tuple[int, int]] = []


@contextlib.contextmanager
def only_memory_of(arguments: tuple[Any, ...]) -> Iterator[None]:
    """Allow accesses to the tensors among a launch's ``arguments``, and to nothing else, inside the block."""
    _install()
    _allowed[:] = [_extent(tensor) for tensor in _tensors(arguments)]
    try:
        yield
    finally:
        _allowed.clear()


def _tensors(argument: Any) -> Iterator[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, TensorDescriptor):
        yield argument.base
    elif isinstance(argument, tuple):
        for part in argument:
            yield from _tensors(part)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The first byte of ``tensor`` and the one after its last."""
    last = reach(tensor.shape, tensor.stride())
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@functools.cache
def _install() -> None:
    load, store, set_attr = (
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
        TensorHandle.set_attr,
    )

    # Descriptor accesses, checked as the loads and stores they become, pass the rest by keyword.
    def checked_load(self, ptrs, mask, *rest, **named):
        _check_access("read", ptrs, mask)
        return load(self, ptrs, mask, *rest, **named)

    def checked_store(self, ptrs, value, mask, *rest, **named):
        _check_access("write", ptrs, mask)
        return store(self, ptrs, value, mask, *rest, **named)

    def checked_set_attr(self, name, values):
        _check_hint(name, np.asarray(self.data), values, self.attr.get("tt.contiguity"))
        return set_attr(self, name, values)

    InterpreterBuilder.create_masked_load = checked_load
    InterpreterBuilder.create_masked_store = checked_store
    TensorHandle.set_attr = checked_set_attr


def _check_access(verb: str, pointers: TensorHandle, mask: TensorHandle) -> None:
    # The interpreter keeps what is combined with a scalar condition in integers.
    inside = np.asarray(mask.data).astype(bool)
    addresses = np.broadcast_to(pointers.data, inside.shape)[inside]
    if not addresses.size or not _allowed:
        return
    first = int(addresses.min())
    last = int(addresses.max()) + pointers.get_element_ty().primitive_bitwidth // 8
    if not any(low <= first and last <= high for low, high in _allowed):
        raise RuntimeError(
            f"kernel would {verb} outside its tensors: bytes {first} to {last}, tensors at {sorted(_allowed)}"
        )


def _check_hint(name: str, data: np.ndarray, values: list[int], runs: list[int] | None) -> None:
    """``runs``: the lengths of runs of consecutive numbers that were promised before."""
    shape = data.shape or (1,)
    data = data.reshape(shape)
    for axis, value in enumerate(values):
        if value == 1:
            continue
        if name == "tt.divisibility":
            # The promise is about the start of each run of consecutive numbers; elsewhere about every element.
            is_run = data.shape[axis] > 1 and (np.diff(data, axis=axis) == 1).all()
            length = data.shape[axis] if is_run else min(runs[axis], data.shape[axis]) if runs else 1
            starts = data.take(range(0, data.shape[axis], length), axis=axis)
            holds = not (starts % value).any()
        elif name == "tt.contiguity":
            block = min(value, data.shape[axis])
            holds = (np.diff(np.moveaxis(data, axis, -1).reshape(-1, block)) == 1).all()
        elif name == "tt.constancy":
            block = min(value, data.shape[axis])
            blocks = np.moveaxis(data, axis, -1).reshape(-1, block)
            holds = (blocks == blocks[:, :1]).all()
        else:
            continue
        if not holds:
            raise RuntimeError(f"hint {name}={value} along dimension {axis} does not hold")
