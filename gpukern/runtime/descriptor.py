"""Tensor descriptors: what Hopper's copy engine (TMA) needs to know of a tensor to fetch boxes of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton.tools.tensor_descriptor import TensorDescriptor


class DescriptorRefused(RuntimeError):
    """The driver makes no tensor map of a descriptor that keeps all the rules below; nothing was launched."""


@dataclass(frozen=True)
class Described:
    """A descriptor but for its tensor: sizes and strides in elements, the last stride 1, and the box that is fetched.

    At most five dimensions; all other strides and the tensor's start are multiples of 16 bytes; a box is at most 256
    long in each dimension. Reads outside the sizes give zeros, writes there are dropped.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]

    def of(self, tensor: torch.Tensor) -> TensorDescriptor:
        # Not the constructor: its checks take longer than all the rest of a launch, and these sizes were checked once.
        descriptor = TensorDescriptor.__new__(TensorDescriptor)
        descriptor.base = tensor
        descriptor.shape = list(self.shape)
        descriptor.strides = list(self.strides)
        descriptor.block_shape = list(self.block)
        descriptor.padding = "zero"
        descriptor.round_f32_to_tf32 = False
        return descriptor

    def checked(self, dtype: torch.dtype) -> Described:
        """Itself; raises ValueError for what the copy engine cannot do."""
        sixteen = 16 // dtype.itemsize
        if not 1 <= len(self.shape) == len(self.strides) == len(self.block) <= 5:
            raise ValueError(f"a descriptor has one to five dimensions: {self}")
        if self.strides[-1] != 1 or any(stride % sixteen for stride in self.strides[:-1]):
            raise ValueError(f"strides must be multiples of 16 bytes, the last one 1: {self}")
        if min(self.shape) < 1 or any(not 1 <= size <= 256 for size in self.block) or self.block[-1] < sixteen:
            raise ValueError(f"a box holds 1 to 256 elements a dimension, 16 bytes at least in the last: {self}")
        return self
