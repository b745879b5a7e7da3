"""Launches the depthwise kernels: forward, input gradient, weight gradient."""

from __future__ import annotations

from typing import Any

import torch

from gpukern.conv.families.depthwise import kernels, weight_kernels
from gpukern.conv.families.depthwise.plan import Axis, Dots, axes, cut_of, tile_sums, tiles_per_split
from gpukern.conv.families.filters import filter_strides
from gpukern.conv.geometry import gemm_mnk
from gpukern.conv.indexing import Filter, Sizes
from gpukern.conv.layouts import Shape, Strides, alignment
from gpukern.conv.plan import ConvPlan, Direction
from gpukern.conv.request import Launch, Request, Tiles
from gpukern.ops._images import Image, strides_of
from gpukern.ops._reduction.launch import shared_sums
from gpukern.ops._reduction.splits import chunk, fan_in
from gpukern.runtime.launcher import compile_time, index_type, launch
from gpukern.runtime.strides import reach


def prepare(request: Request, plan: ConvPlan) -> Launch:
    if request.direction is Direction.WEIGHT_GRAD:
        return _prepare_weight_grad(request, plan)
    return _prepare_gather(request, plan)


def _prepare_gather(request: Request, plan: ConvPlan) -> Launch:
    """Prepare the forward convolution or the input gradient."""
    p, direction = request.problem, request.direction
    of_source, _, of_output = request.shapes
    source, weight, output = map(strides_of, request.shapes, (request.first, request.second, request.output))
    gemm = gemm_mnk(p, direction)
    of_filter = filter_strides(p, weight, direction is Direction.INPUT_GRAD)
    vertical, horizontal = axes(p, direction)
    planes = _in_planes(source, output)
    source_pairs = planes and _in_pairs(of_source, source, horizontal, _sources(horizontal, plan))
    out_pairs = planes and _in_pairs(of_output, output, horizontal, plan.own_box[2])
    sizes = Sizes(p.N, *of_source[2:], *of_output[2:], p.groups, gemm.N, gemm.K)
    options = {
        **_walk(vertical, horizontal, planes),
        "COLUMNS": gemm.N,
        "REDUCTION": gemm.K,
        "SOURCE_PAIRS": source_pairs,
        "OUT_PAIRS": out_pairs,
        # Channels that others lie between are not in runs.
        "SOURCE_ALIGN": _alignment(of_source, source, planes, source_pairs) if gemm.N == gemm.K else 1,
        "OUT_ALIGN": _alignment(of_output, output, planes, out_pairs),
        **_tile(plan, plan.block_n),
        "DOTS": _dots(request, plan, horizontal) if not planes else None,
        "ACTIVATION": request.epilogue.activation,
        "INDEX": index_type(max(map(reach, (of_source, of_output), (source, output)))),
        **request.compile_options,
    }
    cut, rows = cut_of(p, direction, plan), plan.own_box[1]
    constants = compile_time(kernels.conv2d_depthwise_kernel, options)

    def run(
        first, second, out, bias, residual, statistics, negative_slope, z=None, other=None, norm=None, requantize=None
    ) -> None:
        arguments = (
            Image(first, *source),
            Filter(second, *of_filter),
            bias,
            None if residual is None else Image(residual, *output),
            Image(out, *output),
            statistics,
            None if z is None else Image(z, *output),
            None if other is None else Image(other, *output),
            norm,
            requantize,
            sizes,
            rows,
            negative_slope,
        )
        launch(kernels.conv2d_depthwise_kernel, (cut.tiles * cut.channel_blocks,), out.device, arguments, constants)

    return Launch(run, Tiles(cut.tiles, cut.channel_blocks) if request.epilogue.leaves_parts else None)


def _prepare_weight_grad(request: Request, plan: ConvPlan) -> Launch:
    p = request.problem
    of_grad, of_source, _ = request.shapes
    grad, source, output = map(strides_of, request.shapes, (request.first, request.second, request.output))
    of_filter = filter_strides(p, output, False)
    vertical, horizontal = axes(p, request.direction)
    planes = _in_planes(grad, source)
    grad_pairs = planes and _in_pairs(of_grad, grad, horizontal, plan.own_box[2])
    source_pairs = planes and _in_pairs(of_source, source, horizontal, _sources(horizontal, plan))
    programs, size = (cut_of(p, request.direction, plan).channel_blocks, plan.splits), tile_sums(p, plan)
    workspace = shared_sums(*programs, size)
    scalars = (
        Sizes(p.N, p.H, p.W, p.P, p.Q, p.groups, p.group_outputs, 1),
        plan.own_box[1],
        tiles_per_split(p, plan),
        fan_in(plan.splits, size),
    )
    options = {
        **_walk(vertical, horizontal, planes),
        "COLUMNS": p.group_outputs,
        "GRAD_PAIRS": grad_pairs,
        "SOURCE_PAIRS": source_pairs,
        "GRAD_ALIGN": _alignment(of_grad, grad, planes, grad_pairs),
        "SOURCE_ALIGN": _alignment(of_source, source, planes, source_pairs) if p.group_outputs == 1 else 1,
        **_tile(plan, plan.block_m),
        "CHUNK": chunk(size, plan.num_warps),
        "INDEX": index_type(max(map(reach, (of_grad, of_source), (grad, source)))),
    }
    constants = compile_time(weight_kernels.conv2d_depthwise_weight_grad_kernel, options)

    def run(first, second, out, *_) -> None:
        shared = workspace(out.device)
        arguments = (Image(first, *grad), Image(second, *source), Filter(out, *of_filter), shared, *scalars)
        launch(weight_kernels.conv2d_depthwise_weight_grad_kernel, programs, out.device, arguments, constants)

    return Launch(run)


def _dots(request: Request, plan: ConvPlan, axis: Axis) -> Dots | None:
    """Products of int8, four at a time: where there are three taps or more, else a word would be mostly zeros."""
    whole = request.sum_dtype is torch.int32 and request.direction is Direction.FORWARD
    lanes, _, cols = plan.own_box
    channels = lanes * plan.block_n // (32 * plan.num_warps)
    return Dots(axis, cols, channels) if whole and axis.taps >= 3 else None


def _in_planes(*images: Strides) -> bool:
    """Whether any image has planes. An image of single pixels always has its channels side by side."""
    return any(strides[1] != 1 for strides in images)


def _sources(axis: Axis, plan: ConvPlan) -> int:
    """Source columns from one column group to the next adjacent one."""
    cols = plan.own_box[2]
    return cols // axis.ratio if axis.transposed else cols * axis.ratio


def _in_pairs(shape: Shape, strides: Strides, axis: Axis, step: int) -> bool:
    """Whether every pair of columns lies in the image or none of it, and starts at a multiple of two elements."""
    dense = strides[3] == 1 and axis.source_pitch == axis.out_pitch == 1
    return dense and step % 2 == 0 and not any(size % 2 for size in (shape[3], *strides[:3]))


def _alignment(shape: Shape, strides: Strides, planes: bool, pairs: bool) -> int:
    if planes:
        return 2 if pairs else 1
    return alignment(strides, 1, shape[1])


def _walk(vertical: Axis, horizontal: Axis, planes: bool) -> dict[str, Any]:
    return {"AXIS_H": vertical, "AXIS_W": horizontal, "PLANES": planes}


def _tile(plan: ConvPlan, channels: int) -> dict[str, int]:
    lanes, _, cols = plan.own_box
    return {
        "COLS": cols,
        "BLOCK_Q": lanes,
        "BLOCK_C": channels,
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
    }
