"""Launches of copies between layouts and sums over pixels, and the workspace of sums that programs share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch

from gpukern.ops._images import Image, image
from gpukern.ops._reduction import kernels
from gpukern.ops._reduction.functions import Statistics, Sums
from gpukern.ops._reduction.shared_sums import SharedSums
from gpukern.ops._reduction.splits import channel_sum_splits, group_count
from gpukern.runtime.counters import zeroed_counters
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.integers import cdiv, power_of_two
from gpukern.runtime.launcher import index_type, launch
from gpukern.runtime.strides import dense_strides, reach
from gpukern.runtime.tensors import check_kernel_dtype

_NOTHING = Image(None, 0, 0, 0, 0)
#: Channels of a program of :func:`channel_sum`.
_CHANNELS = 64
#: Makes the workspace of a launch on a device; None if no sum is shared.
Workspace = Callable[[torch.device], SharedSums | None]
#: The fewest parts of statistics that are worth a step of their own: as many as a program reads at a time.
_GROUP = 32

_Merged = TypeVar("_Merged", Statistics, Sums)


def channels_last_copy(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` [N, C, H, W], or a matrix as images of one pixel, copied into runs of channels."""
    if tensor.dim() == 2:
        tensor = tensor[:, :, None, None]
    strides = dense_strides(tensor.shape, channels_last=True)
    copy = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    copy_image(tensor, copy)
    return copy


def copy_image(source: torch.Tensor, target: torch.Tensor) -> None:
    """target ← source, both [N, C, H, W] in any layout."""
    N, C, H, W = source.shape
    pixels = N * H * W
    launch(
        kernels.copy_image_kernel,
        (cdiv(pixels, 64), cdiv(C, 64)),
        source.device,
        (image(source), image(target), pixels, C, H, W),
        {
            "BLOCK_M": 64,
            "BLOCK_C": 64,
            "INDEX": index_type(max(reach(source.shape, source.stride()), reach(target.shape, target.stride()))),
            "num_warps": 4,
        },
    )


def shared_sums(tiles: int, splits: int, size: int) -> Workspace:
    """Return what makes the workspace of a launch whose programs share the sums of so many tiles of ``size`` sums."""
    count = group_count(splits, size)

    def workspace(device: torch.device) -> SharedSums | None:
        if splits == 1:
            return None
        parts = torch.empty(tiles * (splits + count) * size, dtype=torch.float32, device=device)
        return SharedSums(parts, zeroed_counters(tiles * (count + 1), device))

    return workspace


def sums_and_deviations(channels: int, device: torch.device) -> Statistics:
    """Return memory for the sum and Σ(y − mean)² of each channel."""
    sums, deviations = (torch.empty(channels, dtype=torch.float32, device=device) for _ in range(2))
    return Statistics(sums=sums, deviations=deviations)


def with_workspace(
    merged: _Merged,
    channels: int,
    device: torch.device,
    rows: int,
    columns: int,
    parts: int = 1,
    taken: int = 0,
    sums: int = 3,
) -> _Merged:
    """Return Statistics, or so many ``sums``, with memory for the parts of rows · columns tiles, and counters.

    ``parts``: how many a tile has. ``taken``: how many counters the launch uses for something else.
    """
    group = power_of_two(math.isqrt(rows), _GROUP)
    groups = cdiv(rows, group)
    size = sums * (rows * parts + groups) * channels
    taken = 4 * cdiv(taken, 4)  # whether a pointer is a multiple of 16 bytes is compiled in
    counters = zeroed_counters(taken + columns * (groups + 1), device)
    return merged._replace(
        parts=torch.empty(size, dtype=torch.float32, device=device),
        counters=counters[taken:] if taken else counters,
        group=group,
    )


def channel_sum(grad: torch.Tensor) -> torch.Tensor:
    """Σ over all but the channels of ``grad`` [N, K, P, Q] or [N, K, Z, P, Q]: [K]."""
    check_kernel_dtype("channel_sum", grad.dtype)
    return _channel_sum(_images(grad), _NOTHING, _NOTHING, "none", 0.0)


def activation_grad_sum(
    grad: torch.Tensor, output: torch.Tensor, activation: str, negative_slope: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``∂L/∂z = ∂L/∂y · act′`` in ``output``'s layout, and its :func:`channel_sum`, in one pass."""
    check_kernel_dtype("activation_grad_sum", grad.dtype)
    inner = torch.empty_like(output)
    images = image(_images(output)), image(_images(inner))
    return inner, _channel_sum(_images(grad), *images, activation, negative_slope)


def _images(tensor: torch.Tensor) -> torch.Tensor:
    """Return planes below one another: a view of dense volumes, in either layout."""
    return tensor.flatten(2, 3) if tensor.dim() == 5 else tensor


def _channel_sum(
    grad: torch.Tensor, output: Image, inner: Image, activation: str, negative_slope: float
) -> torch.Tensor:
    N, K, P, Q = grad.shape
    sums = torch.empty(K, dtype=grad.dtype, device=grad.device)
    pixels = N * P * Q
    if pixels == 0 or K == 0:
        return sums.zero_()
    tiles, splits = cdiv(K, _CHANNELS), channel_sum_splits(pixels, K, device_spec(grad.device))
    shared = shared_sums(tiles, splits, _CHANNELS)(grad.device)
    farthest = max(reach(grad.shape, strides) for strides in (grad.stride(), output[1:], inner[1:]))
    scalars = pixels, K, P, Q, cdiv(pixels, splits), negative_slope
    launch(
        kernels.channel_sum_kernel,
        (tiles, splits),
        grad.device,
        (image(grad), output, inner, sums, shared, *scalars),
        {
            "ACTIVATION": activation,
            "BLOCK_M": _CHANNELS,
            "BLOCK_K": 64,
            "INDEX": index_type(farthest),
            "num_warps": 4,
        },
    )
    return sums
