"""Kernel arguments for tensors: images whose channels are the numbers of a row, and the tile, sizes and options."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from gpukern.ops._batch_norm.functions import Sizes
from gpukern.ops._batch_norm.problem import Shape
from gpukern.ops._images import Image
from gpukern.ops._softmax.planner import SoftmaxPlan, plan
from gpukern.ops._softmax.problem import rows_along
from gpukern.runtime.launcher import index_type
from gpukern.runtime.strides import reach

NOTHING = Image(None, 0, 0, 0, 0)


class Tiles(NamedTuple):
    images: tuple[Image, ...]  # nothing where the tensor is None
    plan: SoftmaxPlan
    sizes: Sizes
    options: dict[str, Any]


def tiles_of(
    dim: int, *tensors: torch.Tensor | None, of_rows: tuple[torch.Tensor | None, ...] = (), kept: int = 1
) -> Tiles:
    """Return the tiles of ``tensors`` of one shape, and of those ``of_rows``, which have all dimensions but ``dim``.

    ``kept``: how many tiles a program holds at a time.
    """
    first: Any = tensors[0]
    given = tuple(t.stride() for t in tensors if t is not None)
    # A number of a row belongs to all of its elements: it is the same, 0 elements further on.
    numbers = tuple(
        (*t.stride()[:dim], 0, *t.stride()[dim:]) if t.dim() else (0,) * first.dim() for t in of_rows if t is not None
    )
    places, chosen, sizes, options = _prepared(dim, tuple(first.shape), given, numbers, first.itemsize, kept)
    images = iter(places)
    every = (*tensors, *of_rows)
    return Tiles(tuple(NOTHING if t is None else Image(t, *next(images)) for t in every), chosen, sizes, options)


@functools.lru_cache(maxsize=4096)
def _prepared(
    dim: int, shape: Shape, strides: tuple[Shape, ...], of_rows: tuple[Shape, ...], itemsize: int, kept: int
) -> tuple[tuple[Shape, ...], SoftmaxPlan, Sizes, dict[str, Any]]:
    path = rows_along(dim, shape, strides, of_rows)
    index = index_type(max(path.pixels, *(reach(shape, stride) for stride in strides + of_rows)))
    chosen = plan(path, itemsize, kept)
    sizes = Sizes(
        path.channels // path.channel_align,
        path.inner // path.pixel_align,
        path.height,
        chosen.blocks,
        chosen.channel_tiles,
        path.pixels,
    )
    options = {
        "WHOLE": chosen.whole,
        "BLOCK_P": chosen.pixels,
        "BLOCK_C": chosen.channels,
        "PIXEL_ALIGN": path.pixel_align,
        "CHANNEL_ALIGN": path.channel_align,
        "INDEX": index,
        "num_warps": chosen.warps,
    }
    return path.strides, chosen, sizes, options


def walkable(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, or a contiguous copy where its dimensions beside the rows' could be too many to walk through."""
    return tensor if tensor.dim() <= 4 else tensor.contiguous()
