"""Group norm by the kernels, in functions of the same names and signatures as ``reference.py``."""

from __future__ import annotations

import torch

from gpukern.ops._activation.properties import PROPERTIES
from gpukern.ops._batch_norm.launch import norm_of
from gpukern.ops._group_norm import kernels
from gpukern.ops._group_norm.tiles import channel_tiles, whole_groups
from gpukern.ops._normalization import Norm
from gpukern.ops._reduction.functions import Statistics, Sums
from gpukern.ops._reduction.launch import with_workspace
from gpukern.runtime.integers import cdiv, power_of_two
from gpukern.runtime.launcher import launch
from gpukern.runtime.tensors import check_kernel_dtype, memory_format_of

# ---- forward -------------------------------------------------------------------------------------------------------


def group_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    groups: int,
    eps: float,
    activation: str,
    negative_slope: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_kernel_dtype("group_norm", input.dtype)
    N, device = input.shape[0], input.device
    output = _empty_like(input)
    if input.numel() == 0:
        mean, variance = (torch.zeros((N, groups), dtype=torch.float32, device=device) for _ in range(2))
        return output, mean, variance
    mean, variance = _numbers(N, groups, device)
    norm = norm_of(mean, variance, weight, bias)
    tiles = whole_groups(groups, (input, residual), output)
    if tiles is not None:
        launch(
            kernels.group_norm_kernel,
            (N * tiles.plan.tiles,),
            device,
            (*tiles.images, norm, tiles.sizes, eps, negative_slope),
            {"ACTIVATION": activation} | tiles.options,
        )
        return output, mean, variance
    _statistics(input, groups, norm)
    tiles = channel_tiles(False, input, residual, output)
    launch(
        kernels.group_norm_apply_kernel,
        (N * tiles.plan.steps * tiles.plan.tiles,),
        device,
        (*tiles.images, norm, tiles.sizes, tiles.plan.steps, input.shape[1] // groups, eps, negative_slope),
        {"ACTIVATION": activation} | tiles.options,
    )
    return output, mean, variance


def _statistics(input: torch.Tensor, groups: int, norm: Norm) -> None:
    """Fill the mean and variance of ``norm``, [N, groups]."""
    (N, C), device = input.shape[:2], input.device
    of_channels = norm if groups == C else norm_of(*_numbers(N, C, device), None, None)
    statistics = Statistics(mean=of_channels.mean, variance=of_channels.variance)
    tiles = channel_tiles(True, input)
    chosen, whole = tiles.plan, tiles.plan.splits == 1
    if not whole:
        statistics = with_workspace(statistics, N * C, device, chosen.splits, N * chosen.tiles)
    launch(
        kernels.group_norm_statistics_kernel,
        (N * chosen.splits * chosen.tiles,),
        device,
        (*tiles.images, statistics, tiles.sizes, N, chosen.steps, chosen.steps_per_split, chosen.splits),
        {"WHOLE": whole, "UNROLL": chosen.unroll} | tiles.options,
    )
    if groups < C:
        rows, columns = _rows(C // groups)
        launch(
            kernels.merge_channels_kernel,
            (cdiv(N * groups, rows),),
            device,
            (of_channels, norm, N * groups, C // groups),
            {"BLOCK_R": rows, "BLOCK_D": columns, "num_warps": 4},
        )


# ---- backward ------------------------------------------------------------------------------------------------------


def group_norm_backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    other: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    groups: int,
    eps: float,
    activation: str,
    negative_slope: float,
    wants_input: bool,
    wants_parameters: bool,
    wants_inner: bool,
) -> tuple[torch.Tensor, ...]:
    check_kernel_dtype("group_norm", input.dtype)
    (N, C), device = input.shape[:2], input.device
    out = _empty_like(input) if wants_input else None
    inner = _empty_like(input) if wants_inner else None
    sums = None
    if wants_parameters:
        # One is there: its gradient is wanted.
        dtype = (bias if weight is None else weight).dtype  # type: ignore[union-attr]
        grad_bias, grad_weight = (torch.empty(C, dtype=dtype, device=device) for _ in range(2))
        sums = Sums(grad_bias=grad_bias, grad_weight=grad_weight)
    parameters = (None, None) if sums is None else (sums.grad_weight, sums.grad_bias)
    results = tuple(input.new_empty(0) if t is None else t for t in (out, *parameters, inner))
    if input.numel() == 0:
        for tensor in results:
            tensor.zero_()
        return results
    norm = norm_of(mean, variance, weight, bias)
    epilogue = activation, negative_slope
    tiles = whole_groups(groups, (grad, input, other), inner, out)
    if tiles is None:
        _large_groups((grad, input, other, inner, out), norm, sums, groups, eps, epilogue)
        return results
    chosen = tiles.plan
    splits, images = (chosen.splits, chosen.images_per_split) if sums else (N, 1)
    whole = splits == 1
    if sums and not whole:
        sums = with_workspace(sums, C, device, splits, chosen.tiles, sums=2)
    launch(
        kernels.group_norm_backward_kernel,
        (splits * chosen.tiles,),
        device,
        (*tiles.images, norm, sums, tiles.sizes, N, images, splits, eps, negative_slope),
        {"WHOLE": whole, **_derivative(activation)} | tiles.options,
    )
    return results


def _large_groups(
    tensors: tuple[torch.Tensor | None, ...],
    norm: Norm,
    wanted: Sums | None,
    groups: int,
    eps: float,
    epilogue: tuple[str, float],
) -> None:
    """The gradients where a group does not fit a tile: ∂L/∂z and the sums, then ∂L/∂x."""
    grad, input, other, inner, out = tensors
    assert grad is not None and input is not None
    (N, C), device = input.shape[:2], input.device
    activation, slope = epilogue
    group = C // groups
    totals = torch.empty((2, N, C), dtype=torch.float32, device=device)
    sums = Sums(totals=totals)
    tiles = channel_tiles(True, grad, input, other, inner)
    chosen, whole = tiles.plan, tiles.plan.splits == 1
    if not whole:
        sums = with_workspace(sums, N * C, device, chosen.splits, N * chosen.tiles, sums=2)
    steps = chosen.steps, chosen.steps_per_split, chosen.splits
    launch(
        kernels.group_norm_sums_kernel,
        (N * chosen.splits * chosen.tiles,),
        device,
        (*tiles.images, norm, sums, tiles.sizes, N, *steps, group, eps, slope),
        # It reads at least two tensors: keep as many loads in flight as the forward does for one.
        {"WHOLE": whole, "UNROLL": max(1, chosen.unroll // 2), **_derivative(activation)} | tiles.options,
    )
    if wanted is not None:
        _sum_images(totals, wanted)
    if out is None:
        return
    of_groups = torch.empty((2, N, groups), dtype=torch.float32, device=device)
    rows, columns = _rows(group)
    launch(
        kernels.weigh_channels_kernel,
        (cdiv(N * groups, rows),),
        device,
        (totals, norm.weight, of_groups, N * groups, groups, group),
        {"BLOCK_R": rows, "BLOCK_D": columns, "num_warps": 4},
    )
    if inner is not None:
        grad, other, activation = inner, None, "none"
    tiles = channel_tiles(False, grad, input, other, out)
    launch(
        kernels.group_norm_input_grad_kernel,
        (N * tiles.plan.steps * tiles.plan.tiles,),
        device,
        (*tiles.images, norm, of_groups, tiles.sizes, N, tiles.plan.steps, group, eps, slope),
        _derivative(activation) | tiles.options,
    )


def _sum_images(totals: torch.Tensor, wanted: Sums) -> None:
    _, N, C = totals.shape
    block_n, block_c = _image_block(N)
    launch(
        kernels.sum_images_kernel,
        (cdiv(C, block_c),),
        totals.device,
        (totals, wanted, N, C),
        {"BLOCK_N": block_n, "BLOCK_C": block_c, "num_warps": 4},
    )


# ---- instance norm's running statistics ----------------------------------------------------------------------------


def update_running(
    mean: torch.Tensor,
    variance: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    momentum: float,
    pixels: int,
) -> None:
    N, C = mean.shape
    block_n, block_c = _image_block(N)
    written = [each if each.is_contiguous() else each.contiguous() for each in (running_mean, running_var)]
    launch(
        kernels.running_statistics_kernel,
        (cdiv(C, block_c),),
        mean.device,
        (Norm(mean, variance, None, None), *written, N, C, momentum, pixels / (pixels - 1)),
        {"BLOCK_N": block_n, "BLOCK_C": block_c, "num_warps": 4},
    )
    for tensor, new in zip((running_mean, running_var), written, strict=True):
        if tensor is not new:
            tensor.copy_(new)
        elif not tensor.is_inference():
            # Autograd must be notified: a backward with these as its statistics needs the old values.
            torch.autograd.graph.increment_version(tensor)


# ---- what these share ----------------------------------------------------------------------------------------------


def _empty_like(input: torch.Tensor) -> torch.Tensor:
    """Allocate a dense, uninitialised tensor in ``input``'s layout."""
    return torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=memory_format_of(input))


def _numbers(N: int, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return memory for mean and variance, fp32 [N, count]."""
    return tuple(torch.empty((N, count), dtype=torch.float32, device=device) for _ in range(2))  # type: ignore[return-value]


def _rows(group: int) -> tuple[int, int]:
    """Return the tile [rows, channels] of a kernel that goes through the channels of groups."""
    columns = power_of_two(group, high=256)
    return max(1, 512 // columns), columns


def _image_block(images: int) -> tuple[int, int]:
    """Return the tile [images, channels] of a kernel that goes through the images."""
    block = power_of_two(images, high=32)
    return block, 1024 // block if block > 8 else 128


def _derivative(activation: str) -> dict[str, str | bool]:
    needs_input = activation != "none" and PROPERTIES[activation].needs_input
    return {"ACTIVATION": activation, "NEEDS_INPUT": needs_input}
