"""Tensor descriptors, from which Hopper's TMA loads boxes of a tensor."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from gpukern.runtime.integers import cdiv

_Described = TypeVar("_Described", bound="Described")


def whole_run(length: int, dtype: torch.dtype) -> int:
    """``length`` elements, rounded up to whole units of 16 bytes."""
    sixteen = 16 // dtype.itemsize
    return cdiv(length, sixteen) * sixteen


def channel_run_strides(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> tuple[int, int, int, int]:
    """The strides of [N, C, H, W] or [K, C, R, S] in runs of channels, such that a descriptor takes them.

    PyTorch leaves any stride at a dimension of one element. It is never used, but a descriptor requires multiples of 16
    bytes there too: the run of channels, rounded up.
    """
    run = whole_run(shape[1], dtype)
    n, _, h, w = (run if size == 1 else stride for size, stride in zip(shape, strides, strict=True))
    return n, 1, h, w


@dataclass(frozen=True)
class Described:
    """A descriptor without its tensor: sizes and strides in elements, the last stride 1, and the box that is loaded.

    At most five dimensions; all other strides and the tensor's start are multiples of 16 bytes; a box is at most 256
    long in each dimension. Reads outside the sizes give zeros, writes there are dropped.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]

    @functools.cached_property
    def _lists(self) -> tuple[list[int], list[int], list[int]]:
        """Return lists, which Triton requires, shared by all descriptors: they are never changed."""
        return list(self.shape), list(self.strides), list(self.block)

    def of(self, tensor: torch.Tensor) -> TensorDescriptor:
        # Not the constructor: its checks take longer than all the rest of a launch, and these sizes were checked once.
        descriptor = TensorDescriptor.__new__(TensorDescriptor)
        descriptor.base = tensor
        descriptor.shape, descriptor.strides, descriptor.block_shape = self._lists
        descriptor.padding = "zero"
        descriptor.round_f32_to_tf32 = False
        return descriptor

    def operand(self, dtype: torch.dtype, precision: str) -> Described:
        """Return itself, :meth:`checked`, as an operand of products of ``precision``: for TF32 it rounds."""
        self.checked(dtype)
        rounds = dtype is torch.float32 and precision == "tf32"
        return _Rounding(self.shape, self.strides, self.block) if rounds else self

    def checked(self: _Described, dtype: torch.dtype) -> _Described:
        """Return itself; raise ValueError for what TMA does not support."""
        sixteen = 16 // dtype.itemsize
        if not 1 <= len(self.shape) == len(self.strides) == len(self.block) <= 5:
            raise ValueError(f"a descriptor has one to five dimensions: {self}")
        if self.strides[-1] != 1 or any(stride % sixteen for stride in self.strides[:-1]):
            raise ValueError(f"strides must be multiples of 16 bytes, the last one 1: {self}")
        if min(self.shape) < 1 or any(not 1 <= size <= 256 for size in self.block) or self.block[-1] < sixteen:
            raise ValueError(f"a box holds 1 to 256 elements a dimension, 16 bytes at least in the last: {self}")
        return self


class _Rounding(Described):
    """A descriptor with which TMA rounds fp32 to TF32: tensor cores would truncate, see ``runtime/precision.py``."""

    def of(self, tensor: torch.Tensor) -> TensorDescriptor:
        descriptor = super().of(tensor)
        descriptor.round_f32_to_tf32 = True
        return descriptor


if not hasattr(TensorDescriptor, "round_f32_to_tf32"):
    # Triton 3.6 has no such field. Later versions implement it by passing another element type to the driver.
    from triton.backends.nvidia import driver

    _TFLOAT32 = 11  # CU_TENSOR_MAP_DATA_TYPE_TFLOAT32
    _plain = driver.make_tensordesc_arg

    def _make_tensordesc_arg(descriptor: Any, metadata: dict | None) -> list:
        if metadata is not None and getattr(descriptor, "round_f32_to_tf32", False):
            metadata = {**metadata, "elem_type": _TFLOAT32}
        return _plain(descriptor, metadata)

    driver.make_tensordesc_arg = _make_tensordesc_arg
