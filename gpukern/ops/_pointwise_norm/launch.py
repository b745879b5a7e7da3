"""A 1×1 convolution between two batch norms, by the kernels: functions like those of ``reference.py``."""

from __future__ import annotations

from typing import Any

import torch

from gpukern.ops._batch_norm.launch import keep, norm_of, statistics_for
from gpukern.ops._batch_norm.problem import Norm, Running
from gpukern.ops._pointwise_norm import kernels
from gpukern.ops._pointwise_norm.kernels import Operand
from gpukern.ops._pointwise_norm.planner import Tile, plan
from gpukern.ops._pointwise_norm.problem import Added, Gradients, Inner, Moments, Outer
from gpukern.ops._reduction.functions import Sums
from gpukern.ops._reduction.launch import channels_last_copy, shared_sums, with_workspace
from gpukern.ops._reduction.splits import chunk, fan_in
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.integers import cdiv
from gpukern.runtime.launcher import index_type, launch


def forward(
    inner: Inner, weight: torch.Tensor, outer: Outer, added: Added | None, running: Running | None
) -> tuple[torch.Tensor, Moments]:
    z, device = inner.z, inner.z.device
    N, C, H, W = z.shape
    pixels, K = N * H * W, weight.shape[0]
    tiles = plan(pixels, C, K, device_spec(device))
    operand, filters = _operand(inner), _rows(weight)
    total, gram = (torch.empty(size, dtype=torch.float32, device=device) for size in ((C,), (C, C)))
    blocks, block = cdiv(C, tiles.gram.channels), tiles.gram.channels
    _sum_over_pixels(
        kernels.pointwise_gram_kernel,
        (operand, gram, total),
        tiles.gram,
        blocks * (blocks + 1) // 2,
        block * block + block,
        operand,
        {"ACTIVATION": inner.activation, "BLOCK_C": block, "BLOCKS": blocks, "INDEX": index_type(z.numel())},
    )
    projected, center = (torch.empty(size, dtype=torch.float32, device=device) for size in ((K, C), (K,)))
    statistics = statistics_for(K, device, running)
    launch(
        kernels.pointwise_statistics_kernel,
        (cdiv(K, tiles.statistics.outputs),),
        device,
        (operand, gram, total, filters, projected, center, statistics, K),
        {
            "ACTIVATION": inner.activation,
            "BLOCK_K": tiles.statistics.outputs,
            "BLOCK_C": tiles.statistics.channels,
            "BLOCK_R": 16,
            **_options(tiles.statistics),
        },
    )
    keep(running, statistics)
    y = torch.empty((N, K, H, W), dtype=z.dtype, device=device, memory_format=torch.channels_last)
    tile, added = tiles.forward, Added(None, None) if added is None else added
    launch(
        kernels.pointwise_forward_kernel,
        (cdiv(pixels, tile.pixels) * cdiv(K, tile.outputs),),
        device,
        (
            *(operand, filters, center, norm_of(None, statistics.variance, outer.weight, outer.bias)),
            *(None if added.tensor is None else _images(added.tensor), _kernel_norm(added.norm)),
            *(y, K, outer.eps, 0.0 if added.norm is None else added.norm.eps, outer.negative_slope),
        ),
        {
            "INNER": inner.activation,
            "ACTIVATION": outer.activation,
            "BLOCK_M": tile.pixels,
            "BLOCK_N": tile.outputs,
            "BLOCK_C": tile.channels,
            "INDEX": index_type(max(z.numel(), y.numel())),
            **_options(tile),
        },
    )
    return y, Moments(total, center, projected, statistics.variance)


def backward(
    grad: torch.Tensor, inner: Inner, weight: torch.Tensor, outer: Outer, moments: Moments, needs: tuple[bool, ...]
) -> Gradients:
    z, device = inner.z, inner.z.device
    N, C, H, W = z.shape
    pixels, K = N * H * W, weight.shape[0]
    tiles = plan(pixels, C, K, device_spec(device))
    grad, operand, filters = _images(grad), _operand(inner), _rows(weight)
    product, of_grad = (torch.empty(size, dtype=torch.float32, device=device) for size in ((K, C), (K,)))
    tile, index = tiles.products, index_type(max(z.numel(), grad.numel()))
    _sum_over_pixels(
        kernels.pointwise_products_kernel,
        (grad, operand, product, of_grad, K),
        tile,
        cdiv(K, tile.outputs) * cdiv(C, tile.channels),
        tile.outputs * tile.channels + tile.outputs,
        operand,
        {"ACTIVATION": inner.activation, "BLOCK_K": tile.outputs, "BLOCK_C": tile.channels, "INDEX": index},
    )
    needs_weight, needs_scale, needs_shift, needs_inner = needs
    by_weight = torch.empty_like(weight) if needs_weight else None
    written = None if by_weight is None else _rows(by_weight)
    coefficients = torch.empty((3, K), dtype=torch.float32, device=device)
    by_scale, by_shift = (
        torch.empty_like(each, memory_format=torch.contiguous_format) if needed else None
        for each, needed in ((outer.weight, needs_scale), (outer.bias, needs_shift))
    )
    launch(
        kernels.pointwise_gradients_kernel,
        (cdiv(K, tiles.gradients.outputs),),
        device,
        (
            *(product, of_grad, moments.total, filters, moments.projected),
            *(norm_of(None, moments.variance, outer.weight, outer.bias), moments.center, coefficients),
            *(written, by_scale, by_shift, pixels, K, C, outer.eps),
        ),
        {
            "BLOCK_K": tiles.gradients.outputs,
            "BLOCK_C": tiles.gradients.channels,
            **_options(tiles.gradients),
        },
    )
    if by_weight is not None and written.data_ptr() != by_weight.data_ptr():  # type: ignore[union-attr]
        by_weight.copy_(written.view(by_weight.shape))  # type: ignore[union-attr]
    if not needs_inner:
        return Gradients(by_weight, by_scale, by_shift, None, None)
    result, tile = torch.empty_like(z), tiles.input_grad
    rows = cdiv(pixels, tile.pixels)
    sums = Sums(totals=torch.empty((2, C), dtype=torch.float32, device=device))
    launch(
        kernels.pointwise_input_grad_kernel,
        (rows,),
        device,
        (
            *(grad, operand, filters, coefficients, result),
            *(with_workspace(sums, C, device, rows, 1, sums=2), K),
        ),
        {
            "ACTIVATION": inner.activation,
            "BLOCK_M": tile.pixels,
            "BLOCK_K": tile.outputs,
            "BLOCK_C": tile.channels,
            "INDEX": index,
            **_options(tile),
        },
    )
    return Gradients(by_weight, by_scale, by_shift, result, sums.totals)


def _sum_over_pixels(
    kernel: Any, arguments: tuple, tile: Tile, tiles: int, size: int, operand: Operand, options: dict[str, Any]
) -> None:
    """Launch a kernel whose programs share the sums of ``tiles`` tiles of ``size`` sums."""
    device, pixels = operand.z.device, operand.pixels
    shared = shared_sums(tiles, tile.splits, size)(device)
    launch(
        kernel,
        (tiles, tile.splits),
        device,
        (*arguments, shared, cdiv(pixels, tile.splits), fan_in(tile.splits, size)),
        {**options, "BLOCK_P": tile.pixels, "CHUNK": chunk(size, tile.warps), **_options(tile)},
    )


def _operand(inner: Inner) -> Operand:
    z, norm = inner.z, inner.norm
    N, C, H, W = z.shape
    return Operand(z, _kernel_norm(norm), norm.eps, inner.negative_slope, N * H * W, C)


def _kernel_norm(norm: Norm | None) -> Any:
    return None if norm is None else norm_of(norm.mean, norm.variance, norm.weight, norm.bias)


def _rows(weight: torch.Tensor) -> torch.Tensor:
    """The filters of a 1×1 convolution as [K, C], contiguous."""
    return weight.flatten(1).contiguous()


def _images(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in rows of channels."""
    return tensor if tensor.is_contiguous(memory_format=torch.channels_last) else channels_last_copy(tensor)


def _options(tile: Tile) -> dict[str, int]:
    return {"num_warps": tile.warps, "num_stages": tile.stages}
