"""Kernel arguments for tensors: images, and the tile, sizes and options of a launch over all of them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton.language as tl

from gpukern.ops._batch_norm.functions import Sizes
from gpukern.ops._batch_norm.problem import Shape, walk
from gpukern.ops._batch_norm.tiles import images_at, walkable
from gpukern.ops._group_norm import planner
from gpukern.ops._group_norm.planner import Resident, Split
from gpukern.ops._images import Image
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.launcher import index_type
from gpukern.runtime.strides import reach


class Tiles(NamedTuple):
    images: tuple[Image, ...]  # nothing where the tensor is None
    plan: Any  # Resident or Split
    sizes: Sizes
    options: dict[str, Any]


def whole_groups(groups: int, inputs: tuple[torch.Tensor | None, ...], *outputs: torch.Tensor | None) -> Tiles | None:
    """Return tiles of whole groups; None if these are too large."""
    tensors, first, strides = walkable((*inputs, *outputs), by_image=True)
    number = sum(each is not None for each in inputs)
    prepared = _whole(tuple(first.shape), strides, groups, first.itemsize, device_spec(first.device), number)
    if prepared is None:
        return None
    places, chosen, sizes, options = prepared
    return Tiles(images_at(tensors, places), chosen, sizes, options)


def channel_tiles(sums: bool, *tensors: torch.Tensor | None) -> Tiles:
    """Return tiles of channels, for a kernel that ``sums`` over the pixels of an image, or for one that does not."""
    tensors, first, strides = walkable(tensors, by_image=True)
    prepared = _channels(tuple(first.shape), strides, first.itemsize, device_spec(first.device), sums)
    places, chosen, sizes, options = prepared
    return Tiles(images_at(tensors, places), chosen, sizes, options)


@functools.lru_cache(maxsize=4096)
def _whole(
    shape: Shape, strides: tuple[Shape, ...], groups: int, itemsize: int, device: DeviceSpec, inputs: int
) -> tuple[tuple[Shape, ...], Resident, Sizes, dict[str, Any]] | None:
    path = walk(shape, strides, True)
    group = shape[1] // groups
    chosen = planner.resident(path, group, itemsize, device, inputs, _index(shape, strides) is tl.int64)
    if chosen is None:
        return None
    align = planner.aligned_group(path, group)
    # All registers that there are: ptxas aims at fewer, for another block a multiprocessor, and spills some.
    options = {"GROUP": group, "BLOCK_D": chosen.columns, "maxnreg": min(255, 2048 // chosen.warps)}
    options |= _options(chosen, path.pixel_align, align, shape, strides)
    return path.strides, chosen, _sizes(path, 1, chosen.tiles, align), options


@functools.lru_cache(maxsize=4096)
def _channels(
    shape: Shape, strides: tuple[Shape, ...], itemsize: int, device: DeviceSpec, sums: bool
) -> tuple[tuple[Shape, ...], Split, Sizes, dict[str, Any]]:
    path = walk(shape, strides, True)
    far = _index(shape, strides) is tl.int64
    chosen = planner.split(path, itemsize, device, sums, far)
    options = _options(chosen, path.pixel_align, path.channel_align, shape, strides)
    return path.strides, chosen, _sizes(path, chosen.blocks, chosen.tiles, path.channel_align), options


def _sizes(path, blocks: int, tiles: int, channel_align: int) -> Sizes:
    pixels = path.height * path.inner
    return Sizes(
        path.channels // channel_align, path.inner // path.pixel_align, path.height, blocks, tiles, pixels
    )  # fmt: skip


def _options(
    chosen: Resident | Split, pixel_align: int, channel_align: int, shape: Shape, strides: tuple[Shape, ...]
) -> dict[str, Any]:
    return {
        "BLOCK_P": chosen.pixels,
        "BLOCK_C": chosen.channels,
        "PIXEL_ALIGN": pixel_align,
        "CHANNEL_ALIGN": channel_align,
        "INDEX": _index(shape, strides),
        "num_warps": chosen.warps,
    }


def _index(shape: Shape, strides: tuple[Shape, ...]) -> tl.dtype:
    return index_type(max(reach(shape, stride) for stride in strides))
