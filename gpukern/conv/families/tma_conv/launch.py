"""Launches of the convolution over boxes of pixels."""

from __future__ import annotations

import math
from typing import Any

from gpukern.conv.families.split_k import split_k_workspace
from gpukern.conv.families.tma_conv import kernels
from gpukern.conv.families.tma_conv.plan import (
    Box,
    box_count,
    output_sizes,
    part,
    reads_every_other,
    reads_halves,
    runs,
    stored,
    tile_count,
    writes_halves,
)
from gpukern.conv.geometry import gemm_mnk
from gpukern.conv.layouts import Shape, Strides
from gpukern.conv.plan import ConvPlan, Direction
from gpukern.conv.request import Launch, Request, Tiles
from gpukern.runtime.descriptor import Described, channel_run_strides
from gpukern.runtime.integers import cdiv
from gpukern.runtime.launcher import compile_time, launch


def prepare(request: Request, plan: ConvPlan) -> Launch:
    p, direction = request.problem, request.direction
    *operands, out = _descriptors(request, plan)
    source, filter = (described.operand(request.dtype, plan.precision) for described in operands)
    out.checked(request.dtypes[2])
    tiles, phases = tile_count(p, direction, plan), 4 if writes_halves(p, direction) else 1
    workspace = split_k_workspace(plan, tiles * phases, request.sum_dtype)
    scalars, options = _scalars(request), _options(request, plan)
    grid, constants = (tiles, phases, plan.splits), compile_time(kernels.conv2d_box_kernel, options)

    def run(
        first,
        second,
        output,
        bias,
        residual,
        statistics,
        negative_slope,
        z=None,
        other=None,
        norm=None,
        requantize=None,
    ) -> None:
        device = output.device
        arguments = (
            source.of(first),
            filter.of(second),
            bias,
            None if residual is None else out.of(residual),
            out.of(output),
            statistics,
            None if z is None else out.of(z),
            None if other is None else out.of(other),
            norm,
            workspace(device) if workspace else None,
            requantize,
            *scalars,
            negative_slope,
        )
        launch(kernels.conv2d_box_kernel, grid, device, arguments, constants)

    parts, boxes = math.prod(plan.own_box) // math.prod(part(plan.own_box)), box_count(p, direction, plan.own_box)
    of_statistics = Tiles(boxes * phases, tiles // boxes, parts) if request.epilogue.leaves_parts else None
    return Launch(run, of_statistics, counters=tiles * phases if workspace else 0)


def _descriptors(request: Request, plan: ConvPlan) -> tuple[Described, Described, Described]:
    """Describe source, filter and output, in the order and the boxes of the kernel."""
    p, direction = request.problem, request.direction
    first, second, output = (
        channel_run_strides(*each)
        for each in zip(request.shapes, (request.first, request.second, request.output), request.dtypes, strict=True)
    )
    shape, box = request.shapes[0], (plan.own_box, plan.block_k)
    if reads_halves(p, direction):
        source = _in_halves(shape, first, *box)
    elif reads_every_other(p, direction):
        (N, C, H, W), (n, c, h, w) = shape, first
        source = _image((N, C, cdiv(H, 2), cdiv(W, 2)), (n, c, 2 * h, 2 * w), *box)
    else:
        source = _image(shape, first, *box)
    describe = _in_halves if writes_halves(p, direction) else _image
    out = describe(request.shapes[2], output, stored(p, part(plan.own_box)), plan.block_n)
    sides = plan.block_n, plan.block_k
    return source, _filter(request.shapes[1], second, sides if direction is Direction.FORWARD else sides[::-1]), out


def _scalars(request: Request) -> tuple[int, ...]:
    p, direction = request.problem, request.direction
    padding_h, padding_w = p.padding[0], p.padding[2]
    if reads_every_other(p, direction):
        padding_h, padding_w = padding_h // 2, padding_w // 2
    halved = request.first if reads_halves(p, direction) else request.output if writes_halves(p, direction) else None
    parity_step = halved[3] if halved else 0
    return *output_sizes(p, direction), gemm_mnk(p, direction).N, padding_h, padding_w, parity_step


def _options(request: Request, plan: ConvPlan) -> dict[str, Any]:
    p, direction = request.problem, request.direction
    halves = reads_halves(p, direction) or writes_halves(p, direction)
    return {
        "REDUCTION": gemm_mnk(p, direction).K,
        "TAPS_H": p.R,
        "TAPS_W": p.S,
        "STRIDE": 2 if halves else 1,
        "DILATION_H": p.dilation[0],
        "DILATION_W": p.dilation[1],
        "TRANSPOSED": direction is Direction.INPUT_GRAD,
        **dict(zip(("BOX_N", "BOX_H", "BOX_W"), plan.own_box, strict=True)),
        **dict(zip(("PART_N", "PART_H", "PART_W"), part(plan.own_box), strict=True)),
        "BLOCK_N": plan.block_n,
        "BLOCK_K": plan.block_k,
        "GROUP_M": plan.group_m,
        "SPLITS": plan.splits,
        "RUNS": runs(p, direction, plan, str(request.dtype).removeprefix("torch."), request.device),
        "ACTIVATION": request.epilogue.activation,
        "POOL": p.pool,
        "PRECISION": plan.precision,
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
        **request.compile_options,
    }


def _image(shape: Shape, strides: Strides, box: Box, block_c: int) -> Described:
    """Describe an image as [N, H, W, C]."""
    N, C, H, W = shape
    n, c, h, w = strides
    return Described((N, H, W, C), (n, h, w, c), (*box, block_c))


def _in_halves(shape: Shape, strides: Strides, box: Box, block_c: int) -> Described:
    """Describe an image as [N, H/2, parity of the row, W/2, (parity of the column, C)]."""
    N, C, H, W = shape
    n, c, h, w = strides
    images, rows, cols = box
    return Described((N, H // 2, 2, W // 2, w + C), (n, 2 * h, h, 2 * w, c), (images, rows, 1, cols, block_c))


def _filter(shape: Shape, strides: Strides, sides: tuple[int, int]) -> Described:
    """Describe the filter as [R, S, K, C]."""
    K, C, R, S = shape
    k, c, r, s = strides
    return Described((R, S, K, C), (r, s, k, c), (1, 1, *sides))
