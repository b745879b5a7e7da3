"""Kernel arguments for tensors: images, and the tile, sizes and options of a launch over all of them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton.language as tl

from gpukern.ops._batch_norm.functions import Sizes
from gpukern.ops._batch_norm.planner import BatchNormPlan, plan
from gpukern.ops._batch_norm.problem import Shape, walk
from gpukern.ops._images import Image
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.launcher import index_type
from gpukern.runtime.strides import reach
from gpukern.runtime.tensors import format_kept_by

NOTHING = Image(None, 0, 0, 0, 0)


class Tiles(NamedTuple):
    images: tuple[Image, ...]  # nothing where the tensor is None
    plan: BatchNormPlan
    sizes: Sizes
    options: dict[str, Any]


def tiles_of(sums: bool, *tensors: torch.Tensor | None, by_image: bool = False) -> Tiles:
    """Return the tiles of ``tensors`` for a kernel that ``sums`` over pixels, or for one that does not.

    ``by_image``: none has pixels of two images.
    """
    tensors, first, strides = walkable(tensors, by_image)
    prepared = _prepared(tuple(first.shape), strides, first.itemsize, device_spec(first.device), sums, by_image)
    places, chosen, sizes, options = prepared
    return Tiles(images_at(tensors, places), chosen, sizes, options)


def walkable(
    tensors: tuple[torch.Tensor | None, ...], by_image: bool = False
) -> tuple[tuple[torch.Tensor | None, ...], torch.Tensor, tuple[Shape, ...]]:
    """Return ``tensors``, the first that there is, and the strides of those that there are.

    Where pixels of more than two dimensions cannot be joined in all of them, copies laid out as the last one are
    returned, which is an output, and dense, if there is one.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    first, strides = given[0], tuple(tensor.stride() for tensor in given)
    if first.dim() > 4:
        try:
            walk(tuple(first.shape), strides, by_image)
        except ValueError:
            layout = format_kept_by(given[-1])
            tensors = tuple(None if t is None else t.contiguous(memory_format=layout) for t in tensors)
            return walkable(tensors, by_image)
    return tensors, first, strides


def images_at(tensors: tuple[torch.Tensor | None, ...], places: tuple[Shape, ...]) -> tuple[Image, ...]:
    """Return the images of ``tensors``, with the strides in ``places`` of those that there are."""
    strides = iter(places)
    return tuple(NOTHING if t is None else Image(t, *next(strides)) for t in tensors)


@functools.lru_cache(maxsize=4096)
def _prepared(
    shape: Shape, strides: tuple[Shape, ...], itemsize: int, device: DeviceSpec, sums: bool, by_image: bool
) -> tuple[tuple[Shape, ...], BatchNormPlan, Sizes, dict[str, Any]]:
    path = walk(shape, strides, by_image)
    index = index_type(max(path.pixels, *(reach(shape, stride) for stride in strides)))
    chosen = plan(path, itemsize, device, sums, far=index is tl.int64)
    sizes = Sizes(
        path.channels // path.channel_align,
        path.inner // path.pixel_align,
        path.height,
        chosen.blocks,
        chosen.channel_tiles,
        path.pixels,
    )
    options = {
        "BLOCK_P": chosen.pixels,
        "BLOCK_C": chosen.channels,
        "PIXEL_ALIGN": path.pixel_align,
        "CHANNEL_ALIGN": path.channel_align,
        "INDEX": index,
        "num_warps": chosen.warps,
    }
    return path.strides, chosen, sizes, options


def empty_like(input: torch.Tensor) -> torch.Tensor:
    """Allocate a dense, uninitialised tensor in ``input``'s layout."""
    return torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=format_kept_by(input))
