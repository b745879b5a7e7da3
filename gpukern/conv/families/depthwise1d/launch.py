"""Launches the depthwise kernels of sequences: forward, input gradient, weight gradient."""

from __future__ import annotations

from gpukern.conv.families.depthwise1d import kernels
from gpukern.conv.families.depthwise1d.kernels import Sequences
from gpukern.conv.families.depthwise1d.plan import (
    Access,
    Taps,
    blocks,
    group_width,
    offsets,
    tile_sums,
    tiles_per_split,
)
from gpukern.conv.layouts import Shape, Strides, alignment
from gpukern.conv.plan import ConvPlan, Direction
from gpukern.conv.request import Launch, Request, Tiles
from gpukern.ops._images import strides_of
from gpukern.ops._reduction.launch import shared_sums
from gpukern.ops._reduction.splits import chunk, fan_in
from gpukern.runtime.integers import cdiv
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
    width = min(group_width(p, direction, request.dtype.itemsize, source[1] == 1), _widest(of_source, source))
    grid = p.N * blocks(p, direction, plan.block_m), cdiv(p.C, plan.block_n)
    options = {
        "FOOTPRINT": Taps(offsets(p, direction), width),
        "SOURCE": _access(of_source, source, width),
        "OUT": _access(of_output, output, width),
        "PLANES": source[1] != 1,
        "BLOCK_C": plan.block_n,
        "BLOCK_G": plan.block_m // width,
        "ACTIVATION": request.epilogue.activation,
        "INDEX": index_type(max(map(reach, (of_source, of_output), (source, output)))),
        "num_warps": plan.num_warps,
    }
    constants = compile_time(kernels.conv2d_depthwise1d_kernel, options)

    def run(first, second, out, bias, residual, statistics, negative_slope) -> None:
        arguments = (
            _sequences(first, source),
            second,
            weight[0],
            weight[3],
            bias,
            None if residual is None else _sequences(residual, output),
            _sequences(out, output),
            statistics,
            *(p.C, of_source[3], of_output[3]),
            negative_slope,
        )
        launch(kernels.conv2d_depthwise1d_kernel, (grid[0] * grid[1],), out.device, arguments, constants)

    return Launch(run, Tiles(*grid) if request.epilogue.statistics else None)


def _prepare_weight_grad(request: Request, plan: ConvPlan) -> Launch:
    p = request.problem
    of_grad, of_source, _ = request.shapes
    grad, source, output = map(strides_of, request.shapes, (request.first, request.second, request.output))
    width = min(group_width(p, request.direction, request.dtype.itemsize, source[1] == 1), _widest(of_source, source))
    programs, size = (cdiv(p.C, plan.block_m), plan.splits), tile_sums(p, plan)
    workspace = shared_sums(*programs, size)
    scalars = (p.N, p.C, p.W, p.Q, tiles_per_split(p, plan), fan_in(plan.splits, size))
    options = {
        "FOOTPRINT": Taps(offsets(p, request.direction), width),
        "GRAD": _access(of_grad, grad, width),
        "SOURCE": _access(of_source, source, width),
        "WHOLE": p.Q % width == 0,
        "PLANES": source[1] != 1,
        "BLOCK_C": plan.block_m,
        "BLOCK_G": plan.block_k // width,
        "CHUNK": chunk(size, plan.num_warps),
        "INDEX": index_type(max(map(reach, (of_grad, of_source), (grad, source)))),
        "num_warps": plan.num_warps,
    }
    constants = compile_time(kernels.conv2d_depthwise1d_weight_grad_kernel, options)

    def run(first, second, out, *_) -> None:
        shared = workspace(out.device)
        arguments = (_sequences(first, grad), _sequences(second, source), out, output[0], output[3], shared, *scalars)
        launch(kernels.conv2d_depthwise1d_weight_grad_kernel, programs, out.device, arguments, constants)

    return Launch(run)


def _sequences(tensor, strides: Strides) -> Sequences:
    n, c, _, step = strides
    return Sequences(tensor, n, c, step)


def _widest(shape: Shape, strides: Strides) -> int:
    """Return the most outputs that a group may have: where positions are adjacent, those of an aligned vector."""
    return 16 if strides[1] == 1 else alignment(strides, 3, shape[3])


def _access(shape: Shape, strides: Strides, width: int) -> Access:
    adjacent = strides[3] == 1
    return Access(adjacent and width > 1, alignment(strides, 1, shape[1]), alignment(strides, 3, shape[3]))
