"""An image tensor as kernels take it: the pointer and the strides of [N, C, H, W] in one argument."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Image(NamedTuple):
    """``ptr`` (a tensor on the host, a pointer in the kernel) and its strides in elements.

    Kernels read any layout by strides: NCHW, channels_last, slices, and expanded dimensions, whose stride is 0.
    """

    ptr: Any
    n: Any
    c: Any
    h: Any
    w: Any


def image(tensor: torch.Tensor) -> Image:
    """The kernel argument of a 4-D ``tensor``."""
    return Image(tensor, *strides_of(tensor))


def strides_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides, 0 for a dimension of one element: PyTorch leaves any number there, and none must spoil the alignment."""
    return tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
