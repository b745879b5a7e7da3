"""Launches of copies between layouts, sums over pixels, and merges of partial results."""

from __future__ import annotations

import math
from typing import TypeVar

import torch

from gpukern.ops._images import Image, image
from gpukern.ops._reduction import kernels
from gpukern.ops._reduction.functions import Statistics, Sums
from gpukern.ops._reduction.splits import channel_sum_splits
from gpukern.runtime.counters import zeroed_counters
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.integers import cdiv, power_of_two
from gpukern.runtime.launcher import index_type, launch
from gpukern.runtime.strides import dense_strides, reach
from gpukern.runtime.tensors import check_kernel_dtype

_NOTHING = Image(None, 0, 0, 0, 0)
#: Partial sums that a program has in flight: 16 per thread.
_LOADS = 2048
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


def partial_sums(output: torch.Tensor, splits: int) -> torch.Tensor:
    """Return the splits' target: ``output`` itself for one split, else fp32 [splits, ...] in its memory order."""
    if splits == 1:
        return output
    return torch.empty((splits, output.numel()), dtype=torch.float32, device=output.device)


def add_partial_sums(partial: torch.Tensor, output: torch.Tensor, splits: int) -> None:
    """Set output ← Σ_split partial[split], added in a fixed order; ``output`` is dense."""
    if splits == 1:
        return
    size = output.numel()
    rows = power_of_two(splits, 1, 32)
    block = _LOADS // rows
    launch(
        kernels.sum_splits_kernel,
        (cdiv(size, block),),
        output.device,
        (partial, output, size, splits),
        {"BLOCK": block, "BLOCK_SPLITS": rows, "num_warps": 4},
    )


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
    """Σ over all but the channels of ``grad`` [N, K, P, Q]: [K]."""
    check_kernel_dtype("channel_sum", grad.dtype)
    return _channel_sum(grad, _NOTHING, _NOTHING, "none", 0.0)


def activation_grad_sum(
    grad: torch.Tensor, output: torch.Tensor, activation: str, negative_slope: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``∂L/∂z = ∂L/∂y · act′`` in ``output``'s layout, and its :func:`channel_sum`, in one pass."""
    check_kernel_dtype("activation_grad_sum", grad.dtype)
    inner = torch.empty_like(output)
    return inner, _channel_sum(grad, image(output), image(inner), activation, negative_slope)


def _channel_sum(
    grad: torch.Tensor, output: Image, inner: Image, activation: str, negative_slope: float
) -> torch.Tensor:
    N, K, P, Q = grad.shape
    sums = torch.empty(K, dtype=grad.dtype, device=grad.device)
    pixels = N * P * Q
    if pixels == 0 or K == 0:
        return sums.zero_()
    splits = channel_sum_splits(pixels, K, device_spec(grad.device))
    partial = partial_sums(sums, splits)
    farthest = max(reach(grad.shape, strides) for strides in (grad.stride(), output[1:], inner[1:]))
    launch(
        kernels.channel_sum_kernel,
        (cdiv(K, 64), splits),
        grad.device,
        (image(grad), output, inner, partial, pixels, K, P, Q, cdiv(pixels, splits), negative_slope),
        {"ACTIVATION": activation, "BLOCK_M": 64, "BLOCK_K": 64, "INDEX": index_type(farthest), "num_warps": 4},
    )
    add_partial_sums(partial, sums, splits)
    return sums
