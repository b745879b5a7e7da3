"""Launches of the matrix products through descriptors: forward, input gradient, weight gradient."""

from __future__ import annotations

from typing import Any

import torch

from gpukern.conv.families.split_k import split_k_workspace
from gpukern.conv.families.tma_gemm import kernels
from gpukern.conv.families.tma_gemm.plan import matrices, parts, persistent, row_tiles, runs, tile_count
from gpukern.conv.geometry import gemm_mnk
from gpukern.conv.layouts import Shape, Strides, pixel_stride
from gpukern.conv.plan import ConvPlan, Direction
from gpukern.conv.request import Launch, Request, Tiles
from gpukern.ops._images import strides_of
from gpukern.ops._reduction.launch import shared_sums
from gpukern.ops._reduction.splits import chunk, fan_in
from gpukern.runtime.descriptor import Described, whole_run
from gpukern.runtime.launcher import compile_time, launch


def prepare(request: Request, plan: ConvPlan) -> Launch:
    if request.direction is Direction.WEIGHT_GRAD:
        return _prepare_weight_grad(request, plan)
    return _prepare_product(request, plan)


def _prepare_product(request: Request, plan: ConvPlan) -> Launch:
    p, forward = request.problem, request.direction is Direction.FORWARD
    gemm = gemm_mnk(p, request.direction)
    pieces = parts(plan)
    dtype, _, written = request.dtypes
    source = _images(request.shapes[0], request.first, dtype, plan, (plan.block_m, plan.block_k))
    source = source.operand(dtype, plan.precision)
    output = _images(request.shapes[2], request.output, written, plan, (plan.block_m // pieces, plan.block_n))
    filter, across_sum = _filter(request, plan, forward)
    images, pixels = matrices(p, plan)
    tiles = tile_count(p, request.direction, plan)
    programs = min(tiles, request.device.sm_count) if persistent(plan) else tiles
    workspace = split_k_workspace(plan, tiles, request.sum_dtype)
    options = {
        "PLANES": plan.box is not None,
        "FILTER_T": across_sum,
        "SPLITS": plan.splits,
        "RUNS": runs(p, request.direction, plan, str(dtype).removeprefix("torch."), request.device),
        "PARTS": pieces,
        "PERSISTENT": persistent(plan),
        "ACTIVATION": request.epilogue.activation,
        **_tile(plan),
        **request.compile_options,
    }
    constants = compile_time(kernels.conv2d_gemm_kernel, options)

    def run(
        first, second, out, bias, residual, statistics, negative_slope, z=None, other=None, norm=None, requantize=None
    ) -> None:
        device = out.device
        arguments = (
            source.of(first),
            filter.of(second),
            bias,
            None if residual is None else output.of(residual),
            output.of(out),
            statistics,
            None if z is None else output.of(z),
            None if other is None else output.of(other),
            norm,
            workspace(device) if workspace else None,
            requantize,
            images,
            pixels,
            gemm.N,
            gemm.K,
            negative_slope,
        )
        launch(kernels.conv2d_gemm_kernel, (programs, plan.splits), device, arguments, constants)

    rows = row_tiles(p, plan)
    of_statistics = Tiles(rows, tiles // rows, pieces) if request.epilogue.leaves_parts else None
    return Launch(run, of_statistics, counters=tiles if workspace else 0)


def _prepare_weight_grad(request: Request, plan: ConvPlan) -> Launch:
    p = request.problem
    grad = _images(request.shapes[0], request.first, request.dtype, plan, (plan.block_k, plan.block_m))
    source = _images(request.shapes[1], request.second, request.dtype, plan, (plan.block_k, plan.block_n))
    grad, source = (described.operand(request.dtype, plan.precision) for described in (grad, source))
    output = Described((p.K, p.C), (p.C, 1), (plan.block_m, plan.block_n)).checked(request.dtype)
    programs, size = (tile_count(p, Direction.WEIGHT_GRAD, plan), plan.splits), plan.block_m * plan.block_n
    workspace = shared_sums(*programs, size)
    scalars = (*matrices(p, plan), p.K, p.C, fan_in(plan.splits, size))
    options = {"PLANES": plan.box is not None, "CHUNK": chunk(size, plan.num_warps), **_tile(plan)}
    constants = compile_time(kernels.conv2d_gemm_weight_grad_kernel, options)

    def run(first, second, out, *_) -> None:
        shared = workspace(out.device)
        target = out if shared else output.of(out)
        arguments = (grad.of(first), source.of(second), target, shared, *scalars)
        launch(kernels.conv2d_gemm_weight_grad_kernel, programs, out.device, arguments, constants)

    return Launch(run)


def _images(shape: Shape, strides: Strides, dtype: torch.dtype, plan: ConvPlan, box: tuple[int, int]) -> Described:
    """Describe images [N, C, H, W] as [pixels, C] in boxes of (pixels, channels); for NCHW plans as [N, C, pixels]."""
    N, C, H, W = shape
    if plan.box:
        described = Described((N, C, H * W), (C * H * W, H * W, 1), (1, *reversed(box)))
    else:
        described = _matrix(N * H * W, C, pixel_stride(shape, strides), box, dtype)
    return described.checked(dtype)


def _filter(request: Request, plan: ConvPlan, forward: bool) -> tuple[Described, bool]:
    """Describe the filter [K, C, 1, 1] as a matrix whose rows are its runs, and whether these lie across the sum."""
    K, C, *_ = shape = request.shapes[1]
    k, c, *_ = strides_of(shape, request.second)
    along_inputs = c == 1 or k != 1
    rows, runs, stride = (K, C, k) if along_inputs else (C, K, c)
    across_sum = along_inputs != forward
    box = (plan.block_k, plan.block_n) if across_sum else (plan.block_n, plan.block_k)
    described = _matrix(rows, runs, stride, box, request.dtype)
    return described.operand(request.dtype, plan.precision), across_sum


def _matrix(rows: int, run: int, stride: int, box: tuple[int, int], dtype: torch.dtype) -> Described:
    """Describe a matrix [rows, run]; the stride of a single row may be any number."""
    return Described((rows, run), (whole_run(run, dtype) if rows == 1 else stride, 1), box)


def _tile(plan: ConvPlan) -> dict[str, Any]:
    return {
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "BLOCK_K": plan.block_k,
        "GROUP_M": plan.group_m,
        "PRECISION": plan.precision,
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
    }
