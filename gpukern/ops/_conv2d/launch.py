"""Launches the convolution kernels. Functions of the same names and signatures as ``reference.py``."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton

from gpukern.ops._conv2d import kernels, weight_kernels
from gpukern.ops._conv2d.gather import Filter, Sizes
from gpukern.ops._conv2d.plan import ConvPlan, Direction, Variant, channel_sum_splits, plan
from gpukern.ops._conv2d.problem import ConvProblem
from gpukern.ops._image import image, strides_of
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.launch import index_type, launch, reach
from gpukern.runtime.precision import conv_precision
from gpukern.runtime.tensors import check_kernel_dtype, memory_format_of


def conv2d(
    problem: ConvProblem,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    check_kernel_dtype("conv2d", input)
    output = torch.empty(
        (problem.N, problem.K, problem.P, problem.Q),
        dtype=input.dtype,
        device=input.device,
        memory_format=memory_format_of(input, weight),
    )
    precision = conv_precision(input.dtype)
    gather(problem, Direction.FORWARD, input, weight, bias, output, precision, activation, negative_slope)
    return output


def conv2d_input_grad(
    problem: ConvProblem, grad: torch.Tensor, weight: torch.Tensor, memory_format: torch.memory_format
) -> torch.Tensor:
    check_kernel_dtype("conv2d_input_grad", grad)
    shape = (problem.N, problem.C, problem.H, problem.W)
    output = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format)
    gather(problem, Direction.INPUT_GRAD, grad, weight, None, output, conv_precision(grad.dtype))
    return output


def conv2d_weight_grad(
    problem: ConvProblem, grad: torch.Tensor, input: torch.Tensor, memory_format: torch.memory_format
) -> torch.Tensor:
    check_kernel_dtype("conv2d_weight_grad", grad)
    shape = (problem.K, problem.group_inputs, problem.R, problem.S)
    output = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format)
    weight_grad(problem, grad, input, output, conv_precision(grad.dtype))
    return output


def channel_sum(grad: torch.Tensor) -> torch.Tensor:
    check_kernel_dtype("channel_sum", grad)
    N, K, P, Q = grad.shape
    output = torch.empty(K, dtype=grad.dtype, device=grad.device)
    pixels = N * P * Q
    if pixels == 0 or K == 0:
        return output.zero_()
    splits = channel_sum_splits(pixels, K, device_spec(grad.device))
    partial = _partial_sums(output, splits)
    launch(
        weight_kernels.channel_sum_kernel,
        (triton.cdiv(K, 64), splits),
        grad.device,
        image(grad),
        partial,
        pixels,
        K,
        P,
        Q,
        triton.cdiv(pixels, splits),
        BLOCK_M=64,
        BLOCK_K=64,
        INDEX=index_type(reach(grad)),
        num_warps=4,
    )
    _add_splits(partial, output, splits)
    return output


# ---- forward and input gradient ------------------------------------------------------------------------------------


def gather(
    problem: ConvProblem,
    direction: Direction,
    source: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    precision: str,
    activation: str = "none",
    negative_slope: float = 0.0,
) -> None:
    """Run the gather kernel: ``source`` is x or ∂L/∂y, ``output`` y or ∂L/∂x, as ``direction`` says."""
    if output.numel() == 0:
        return
    choice = plan(problem, direction, _dtype_name(source), precision, device_spec(source.device))
    if choice.variant is Variant.TAPS:
        source, weight = in_channel_runs(source), in_channel_runs(weight)
    grid, meta = _gather_meta(problem, direction, choice)
    transposed = direction is Direction.INPUT_GRAD
    columns, reduction = problem.group_outputs, problem.group_inputs
    if transposed:
        columns, reduction = reduction, columns
    groups = 1 if choice.variant is not Variant.DIRECT else problem.groups
    launch(
        kernels.conv2d_gather_kernel,
        grid,
        source.device,
        image(source),
        _filter(weight, problem, transposed),
        bias,
        image(output),
        Sizes(problem.N, *source.shape[2:], *output.shape[2:], problem.groups, columns, reduction),
        problem.padding[0],
        problem.padding[2],
        negative_slope,
        SOURCE_ALIGN=alignment(source, 1, source.shape[1] if groups > 1 else reduction),
        FILTER_ALIGN=filter_alignment(weight, problem),
        OUT_ALIGN=alignment(output, 1, output.shape[1] if groups > 1 else columns),
        ACTIVATION=activation,
        PRECISION=precision,
        INDEX=index_type(reach(source, weight, output)),
        **meta,
    )


@functools.lru_cache(maxsize=4096)
def _gather_meta(
    problem: ConvProblem, direction: Direction, choice: ConvPlan
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Grid and compile-time arguments that follow from problem and plan alone."""
    transposed = direction is Direction.INPUT_GRAD
    stride, dilation = problem.stride, problem.dilation
    if transposed:
        columns, reduction = problem.group_inputs, problem.group_outputs
        pixels = problem.N * triton.cdiv(problem.H, stride[0]) * triton.cdiv(problem.W, stride[1])
        phases = stride[0] * stride[1]
        steps = tuple(s // math.gcd(s, d) for s, d in zip(stride, dilation, strict=True))
    else:
        columns, reduction = problem.group_outputs, problem.group_inputs
        pixels = problem.N * problem.P * problem.Q
        phases = 1
        steps = (1, 1)
    if pixels >= 2**31 - choice.block_m:
        raise RuntimeError(f"conv2d: {pixels} output pixels are more than gpukern's kernels count (2³¹)")
    groups = problem.groups
    if choice.variant is Variant.DIRECT:
        columns, groups = columns * groups, 1
    grid = (triton.cdiv(pixels, choice.block_m) * triton.cdiv(columns, choice.block_n), groups, phases)
    meta = dict(
        _window(problem),
        TAP_STEP_H=steps[0],
        TAP_STEP_W=steps[1],
        TRANSPOSED=transposed,
        VARIANT=choice.variant.value,
        EVEN_K=reduction % choice.block_k == 0,
    )
    return grid, meta | _tile(choice)


def _filter(weight: torch.Tensor, problem: ConvProblem, transposed: bool) -> Filter:
    k, c, r, s = strides_of(weight)
    group = problem.group_outputs * k
    return Filter(weight, group, c, k, r, s) if transposed else Filter(weight, group, k, c, r, s)


# ---- weight gradient -----------------------------------------------------------------------------------------------


def weight_grad(
    problem: ConvProblem, grad: torch.Tensor, input: torch.Tensor, output: torch.Tensor, precision: str
) -> None:
    """Write ``∂L/∂w`` into ``output`` [K, C/G, R, S], any dense layout."""
    if output.numel() == 0:
        return
    pixels = problem.N * problem.P * problem.Q
    if pixels == 0:
        output.zero_()
        return
    choice = plan(problem, Direction.WEIGHT_GRAD, _dtype_name(grad), precision, device_spec(grad.device))
    if choice.variant is Variant.TAPS:
        grad, input = in_channel_runs(grad), in_channel_runs(input)
    direct = choice.variant is Variant.DIRECT
    partial = _partial_sums(output, choice.splits)
    k, c, r, s = strides_of(output)
    launch(
        weight_kernels.conv2d_weight_grad_kernel,
        _weight_grad_grid(problem, choice),
        grad.device,
        image(grad),
        image(input),
        Filter(partial, problem.group_outputs * k, k, c, r, s),
        output.numel(),
        Sizes(
            problem.N, problem.H, problem.W, problem.P, problem.Q,
            problem.groups, problem.group_outputs, problem.group_inputs,
        ),
        triton.cdiv(pixels, choice.splits),
        problem.padding[0],
        problem.padding[2],
        VARIANT=choice.variant.value,
        GRAD_ALIGN=alignment(grad, 1, problem.K if direct else problem.group_outputs),
        SOURCE_ALIGN=alignment(input, 1, problem.C if direct else problem.group_inputs),
        PRECISION=precision,
        INDEX=index_type(reach(grad, input)),
        **_window(problem),
        **_tile(choice),
    )  # fmt: skip
    _add_splits(partial, output, choice.splits)


def _weight_grad_grid(problem: ConvProblem, choice: ConvPlan) -> tuple[int, int, int]:
    taps, channels, groups = problem.R * problem.S, problem.group_inputs, problem.groups
    rows = problem.group_outputs
    if choice.variant is Variant.DIRECT:
        rows, columns, groups = problem.K, taps * channels, 1
    elif choice.variant is Variant.FLAT:
        columns = triton.cdiv(taps * channels, choice.block_n)
    else:
        columns = taps * triton.cdiv(channels, choice.block_n)
    return triton.cdiv(rows, choice.block_m) * columns, groups, choice.splits


def _partial_sums(output: torch.Tensor, splits: int) -> torch.Tensor:
    """Where the splits write: ``output`` itself if there is one, else fp32 [splits, ...] in ``output``'s memory order."""
    if splits == 1:
        return output
    return torch.empty((splits, output.numel()), dtype=torch.float32, device=output.device)


def _add_splits(partial: torch.Tensor, output: torch.Tensor, splits: int) -> None:
    if splits == 1:
        return
    size = output.numel()
    launch(
        weight_kernels.sum_splits_kernel,
        (triton.cdiv(size, 256),),
        output.device,
        partial,
        output,
        size,
        splits,
        BLOCK=256,
        num_warps=4,
    )


# ---- layouts -------------------------------------------------------------------------------------------------------


def in_channel_runs(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` itself if one dimension of channels is contiguous, else a channels_last copy by our own kernel.

    A tile read across the runs needs one small load for every element, which costs more than a pass over the tensor.
    """
    if tensor.stride(1) == 1 or tensor.shape[1] == 1 or tensor.stride(0) == 1:
        return tensor
    N, C, H, W = tensor.shape
    packed = torch.empty((N, H, W, C), dtype=tensor.dtype, device=tensor.device).permute(0, 3, 1, 2)
    pixels = N * H * W
    launch(
        kernels.to_channels_last_kernel,
        (triton.cdiv(pixels, 64), triton.cdiv(C, 64)),
        tensor.device,
        image(tensor),
        image(packed),
        pixels,
        C,
        H,
        W,
        BLOCK_M=64,
        BLOCK_C=64,
        INDEX=index_type(reach(tensor, packed)),
        num_warps=4,
    )
    return packed


def alignment(tensor: torch.Tensor, dimension: int, run: int) -> int:
    """The power of two, at most 16, that every run of ``run`` elements along ``dimension`` starts at a multiple of.

    1 where the dimension is not contiguous. The kernels pass it to the compiler, which then reads 16 bytes at once; a
    claim too high would make it read the wrong ones.
    """
    if tensor.stride(dimension) != 1:
        return 1
    strides = (stride for i, stride in enumerate(strides_of(tensor)) if i != dimension)
    return math.gcd(16, run, *strides)


def filter_alignment(weight: torch.Tensor, problem: ConvProblem) -> int:
    """:func:`alignment` of a filter, whose runs may lie along C/groups or along K."""
    if weight.stride(1) == 1:
        return alignment(weight, 1, 16)
    # Along K a group starts after group_outputs elements.
    return alignment(weight, 0, 16 if problem.groups == 1 else problem.group_outputs)


def _window(problem: ConvProblem) -> dict[str, int]:
    return {
        "TAPS_H": problem.R,
        "TAPS_W": problem.S,
        "STRIDE_H": problem.stride[0],
        "STRIDE_W": problem.stride[1],
        "DILATION_H": problem.dilation[0],
        "DILATION_W": problem.dilation[1],
    }


def _tile(choice: ConvPlan) -> dict[str, int]:
    return {
        "BLOCK_M": choice.block_m,
        "BLOCK_N": choice.block_n,
        "BLOCK_K": choice.block_k,
        "GROUP_M": choice.group_m,
        "num_warps": choice.num_warps,
        "num_stages": choice.num_stages,
    }


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
