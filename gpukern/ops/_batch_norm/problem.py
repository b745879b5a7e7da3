"""Batch norm as a problem: its sizes, checked, and the memory order in which a kernel walks through its tensors.

Names: batch N, channels C, and all other dimensions together are pixels: (N, C) has one pixel an image, (N, C, L) has
L, (N, C, H, W) has H · W.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gpukern.runtime.strides import joined_to

Shape = tuple[int, ...]


class Running(NamedTuple):
    """Running statistics [C], updated in place: ``old ← (1 − momentum) · old + momentum · new``, variance unbiased."""

    mean: Any
    variance: Any
    momentum: float


class Norm(NamedTuple):
    """A batch norm's numbers of each channel: mean and biased variance [C], weight and bias [C] or None; and eps."""

    mean: Any
    variance: Any
    weight: Any
    bias: Any
    eps: float = 1e-5


def check_sizes(shape: Sequence[int], residual_shape: Sequence[int] | None) -> None:
    """Raise RuntimeError, as torch does, for sizes that do not fit. Works on a tracer's symbolic sizes too."""
    if len(shape) < 2:
        raise RuntimeError(f"batch_norm: expected an input of 2 dimensions at least, got size {list(shape)}")
    if residual_shape is not None and tuple(residual_shape) != tuple(shape):
        raise RuntimeError(f"expected residual to have the input's shape {list(shape)}, but got {list(residual_shape)}")


def check_several_values(shape: Sequence[int]) -> None:
    """Raise torch's ValueError for one value per channel, whose variance is undefined."""
    if math.prod((shape[0], *shape[2:])) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(shape)}")


# eq=False: walks are made once for each set of strides (the function below keeps them), so identity is equality.
@dataclass(frozen=True, eq=False)
class Walk:
    """``rows`` · ``height`` runs of ``inner`` pixels, for each of ``channels`` channels.

    ``strides``: of each tensor, in elements, those of [rows, channels, height, inner]. Where all tensors allow it,
    dimensions are joined: NCHW is (1, N, H·W), channels_last (1, 1, N·H·W).

    Along one dimension neighbours are adjacent in all tensors (or are one element, as in an expanded gradient).
    ``channel_align`` or ``pixel_align`` is the power of two, at most 16, that every such run starts at a multiple of,
    and that divides the dimension: the kernels then read 16 bytes at once. The other one is 1.
    """

    channels: int
    rows: int
    height: int
    inner: int
    strides: tuple[Shape, ...]
    channels_run: bool
    channel_align: int
    pixel_align: int

    @property
    def pixels(self) -> int:
        return self.rows * self.height * self.inner


@functools.lru_cache(maxsize=4096)
def walk(shape: Shape, strides: tuple[Shape, ...], by_image: bool = False) -> Walk:
    """Return the walk through tensors of one shape [N, C, ...], not empty, and of these strides.

    ``by_image``: the rows are the N images, joined with nothing.
    """
    channels = shape[1]
    channel_strides = [s[1] if channels > 1 else 0 for s in strides]
    if by_image:
        (height, inner), within = joined_to(2, shape[2:], [s[2:] for s in strides])
        rows, steps = shape[0], [[s[0] if shape[0] > 1 else 0, *w] for s, w in zip(strides, within, strict=True)]
    else:
        (rows, height, inner), steps = joined_to(3, [shape[0], *shape[2:]], [(s[0], *s[2:]) for s in strides])
    places = tuple((s[0], c, s[1], s[2]) for s, c in zip(steps, channel_strides, strict=True))
    channels_run = all(c in (0, 1) for c in channel_strides) and 1 in channel_strides
    pixels_run = not channels_run and all(s[2] in (0, 1) for s in steps)
    aligned = math.gcd(16, *((channels,) if channels_run else (inner,)))
    for n, c, h, w in places:
        aligned = math.gcd(aligned, n, h, w if channels_run else c)
    return Walk(
        channels,
        rows,
        height,
        inner,
        places,
        channels_run,
        channel_align=aligned if channels_run else 1,
        pixel_align=aligned if pixels_run else 1,
    )
