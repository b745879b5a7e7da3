"""Layout class of a tensor from its strides alone, and the width at which a kernel may read it."""

from __future__ import annotations

import math

from gpukern.conv.plan import Layout
from gpukern.ops._images import strides_of
from gpukern.runtime.strides import dense_strides

Shape = tuple[int, int, int, int]
Strides = tuple[int, ...]


def _is_dense(shape: Shape, strides: Strides) -> bool:
    wanted = dense_strides(shape, channels_last=False)
    return all(size == 1 or s == w for size, s, w in zip(shape, strides, wanted, strict=True))


def layout_of(shape: Shape, strides: Strides, itemsize: int, aligned: bool) -> Layout:
    """Return the layout. ``aligned``: the tensor starts at a multiple of 16 bytes. Empty tensors count as strided."""
    if 0 in shape:
        return Layout.STRIDED
    sixteen = 16 // itemsize
    n, c, h, w = strides_of(shape, strides)
    overlaps = any(size > 1 and stride <= 0 for size, stride in zip(shape, strides, strict=True))
    if not overlaps:
        if c == 1 or shape[1] == 1:
            if aligned and not any(stride % sixteen for stride in (n, h, w)):
                return Layout.NHWC if pixel_stride(shape, strides) else Layout.NHWC_STRIDED
            if c == 1:
                return Layout.CHANNELS
        if n == 1 and h == w == 0 and aligned and c % sixteen == 0:
            return Layout.TRANSPOSED
        if aligned and _is_dense(shape, strides):
            return Layout.NCHW
    return Layout.STRIDED


def pixel_stride(shape: Shape, strides: Strides) -> int:
    """Return the elements from one pixel to the next if all N · H · W collapse to one dimension, otherwise 0.

    For a single pixel, return the number of channels, as if other pixels followed.
    """
    step, length = 0, 1
    for size, stride in ((shape[i], strides[i]) for i in (3, 2, 0)):
        if size == 1:
            continue
        if step and stride != step * length:
            return 0
        step = step or stride
        length *= size
    return step or shape[1]


def alignment(strides: Strides, dimension: int, run: int) -> int:
    """Return the power of two, at most 16, that divides the start of every run of ``run`` elements along ``dimension``.

    It is 1 if the dimension is not contiguous. The kernels pass it to the compiler, which then reads 16 bytes at once;
    too high a value would make it read the wrong ones. ``strides`` are those of :func:`gpukern.ops._images.strides_of`.
    """
    if strides[dimension] != 1:
        return 1
    return math.gcd(16, run, *(stride for i, stride in enumerate(strides) if i != dimension))
