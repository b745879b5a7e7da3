"""An image tensor as kernels take it: the pointer and the strides of [N, C, H, W] in one argument; volumes likewise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Image(NamedTuple):
    """An image: ``ptr`` (a tensor on the host, a pointer in the kernel) and its strides in elements.

    Kernels read any layout by strides: NCHW, channels_last, slices, and expanded dimensions, whose stride is 0.
    """

    ptr: Any
    n: Any
    c: Any
    h: Any
    w: Any


class Volume(NamedTuple):
    """As :class:`Image`, of [N, C, D, H, W]."""

    ptr: Any
    n: Any
    c: Any
    d: Any
    h: Any
    w: Any


def image(tensor: torch.Tensor) -> Image:
    """The kernel argument of a 4-D ``tensor``."""
    return Image(tensor, *strides_of(tensor.shape, tensor.stride()))


def strides_of(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Return the strides, 0 for a dimension of one element: PyTorch leaves any number there, which hides alignments."""
    return tuple(0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True))
