"""Launches the matrix products by descriptors: forward, input gradient, weight gradient."""

from __future__ import annotations

from typing import Any

import torch

from gpukern.conv.families.split_k import split_k_workspace
from gpukern.conv.families.tma_gemm import kernels
from gpukern.conv.families.tma_gemm.plan import matrices, parts, persistent, row_tiles, tile_count
from gpukern.conv.geometry import gemm_mnk
from gpukern.conv.layouts import Shape, Strides, pixel_stride
from gpukern.conv.plan import ConvPlan, Direction
from gpukern.conv.request import Launch, Request
from gpukern.ops._image import strides_of
from gpukern.ops._reduction.launch import add_partial_sums, partial_sums
from gpukern.runtime.descriptor import Described, whole_run
from gpukern.runtime.launch import compile_time, launch


def prepare(request: Request, choice: ConvPlan) -> Launch:
    if request.direction is Direction.WEIGHT_GRAD:
        return _prepare_weight_grad(request, choice)
    return _prepare_product(request, choice)


def _prepare_product(request: Request, choice: ConvPlan) -> Launch:
    p, forward = request.problem, request.direction is Direction.FORWARD
    gemm = gemm_mnk(p, request.direction)
    pieces = parts(choice)
    source = _images(request.shapes[0], request.first, request, choice, (choice.block_m, choice.block_k))
    source = source.operand(request.dtype, choice.precision)
    output = _images(request.shapes[2], request.output, request, choice, (choice.block_m // pieces, choice.block_n))
    filter, across_sum = _filter(request, choice, forward)
    images, pixels = matrices(p, choice)
    tiles = tile_count(p, request.direction, choice)
    programs = min(tiles, request.device.sm_count) if persistent(choice) else tiles
    workspace = split_k_workspace(choice, tiles)
    options = {
        "PLANES": choice.box is not None,
        "FILTER_T": across_sum,
        "SPLITS": choice.splits,
        "PARTS": pieces,
        "PERSISTENT": persistent(choice),
        "ACTIVATION": request.epilogue.activation,
        **_tile(choice),
    }
    constants = compile_time(kernels.conv2d_gemm_kernel, options)

    def run(first, second, out, bias, residual, statistics, negative_slope) -> None:
        device = out.device
        partial = counters = None
        if workspace:
            partial, counters = workspace(device)
        arguments = (
            source.of(first),
            filter.of(second),
            bias,
            None if residual is None else output.of(residual),
            output.of(out),
            statistics,
            partial,
            counters,
            images,
            pixels,
            gemm.N,
            gemm.K,
            negative_slope,
        )
        launch(kernels.conv2d_gemm_kernel, (programs, choice.splits), device, arguments, constants)

    return Launch(run, row_tiles(p, choice) * pieces if request.epilogue.statistics else 0)


def _prepare_weight_grad(request: Request, choice: ConvPlan) -> Launch:
    p = request.problem
    grad = _images(request.shapes[0], request.first, request, choice, (choice.block_k, choice.block_m))
    source = _images(request.shapes[1], request.second, request, choice, (choice.block_k, choice.block_n))
    grad, source = (described.operand(request.dtype, choice.precision) for described in (grad, source))
    of_partial = torch.float32 if choice.splits > 1 else request.dtype
    output = Described((choice.splits, p.K, p.C), (p.K * p.C, p.C, 1), (1, choice.block_m, choice.block_n)).checked(
        of_partial
    )
    scalars = (*matrices(p, choice), p.K, p.C)
    programs = tile_count(p, Direction.WEIGHT_GRAD, choice), choice.splits
    options = {"PLANES": choice.box is not None, **_tile(choice)}
    constants = compile_time(kernels.conv2d_gemm_weight_grad_kernel, options)

    def run(first, second, out, *_) -> None:
        partial = partial_sums(out, choice.splits)
        arguments = (grad.of(first), source.of(second), output.of(partial), *scalars)
        launch(kernels.conv2d_gemm_weight_grad_kernel, programs, out.device, arguments, constants)
        add_partial_sums(partial, out, choice.splits)

    return Launch(run)


def _images(shape: Shape, strides: Strides, request: Request, choice: ConvPlan, box: tuple[int, int]) -> Described:
    """Images [N, C, H, W] as [pixels, C], in boxes of (pixels, channels); of a plan for NCHW as [N, C, pixels]."""
    N, C, H, W = shape
    if choice.box:
        described = Described((N, C, H * W), (C * H * W, H * W, 1), (1, *reversed(box)))
    else:
        described = _matrix(N * H * W, C, pixel_stride(shape, strides), box, request.dtype)
    return described.checked(request.dtype)


def _filter(request: Request, choice: ConvPlan, forward: bool) -> tuple[Described, bool]:
    """The filter [K, C, 1, 1] as a matrix whose rows are its runs, and whether these lie across the sum."""
    K, C, *_ = shape = request.shapes[1]
    k, c, *_ = strides_of(shape, request.second)
    along_inputs = c == 1 or k != 1
    rows, runs, stride = (K, C, k) if along_inputs else (C, K, c)
    across_sum = along_inputs != forward
    box = (choice.block_k, choice.block_n) if across_sum else (choice.block_n, choice.block_k)
    described = _matrix(rows, runs, stride, box, request.dtype)
    return described.operand(request.dtype, choice.precision), across_sum


def _matrix(rows: int, run: int, stride: int, box: tuple[int, int], dtype: torch.dtype) -> Described:
    """[rows, run]; the stride of a single row may be any number."""
    return Described((rows, run), (whole_run(run, dtype) if rows == 1 else stride, 1), box)


def _tile(choice: ConvPlan) -> dict[str, Any]:
    return {
        "BLOCK_M": choice.block_m,
        "BLOCK_N": choice.block_n,
        "BLOCK_K": choice.block_k,
        "GROUP_M": choice.group_m,
        "PRECISION": choice.precision,
        "num_warps": choice.num_warps,
        "num_stages": choice.num_stages,
    }
