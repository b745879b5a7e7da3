"""Launches of the implicit-GEMM kernels: forward, input gradient, weight gradient."""

from __future__ import annotations

import math
from typing import Any

import torch

from gpukern.conv.families.filters import filter_alignment, filter_strides, tap_options, window_options
from gpukern.conv.families.implicit_gemm import kernels, weight_kernels
from gpukern.conv.families.implicit_gemm.plan import grid
from gpukern.conv.families.split_k import split_k_workspace
from gpukern.conv.geometry import gemm_mnk, tiled_pixels
from gpukern.conv.indexing import Filter, Sizes
from gpukern.conv.layouts import alignment
from gpukern.conv.plan import ConvPlan, Direction, Variant
from gpukern.conv.request import Launch, Request, Tiles
from gpukern.ops._images import Image, strides_of
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
    p, transposed = request.problem, request.direction is Direction.INPUT_GRAD
    image, _, result = request.shapes
    source, weight, output = map(strides_of, request.shapes, (request.first, request.second, request.output))
    gemm = gemm_mnk(p, request.direction)
    direct = plan.variant is Variant.DIRECT
    of_filter = filter_strides(p, weight, transposed)
    sizes = Sizes(p.N, *image[2:], *result[2:], p.groups, gemm.N, gemm.K)
    options = {
        **window_options(p),
        **tap_options(p, transposed),
        "VARIANT": plan.variant.value,
        "EVEN_K": gemm.K % plan.block_k == 0,
        "SOURCE_ALIGN": alignment(source, 1, image[1] if direct else gemm.K),
        "FILTER_ALIGN": filter_alignment(p, weight),
        "OUT_ALIGN": alignment(output, 1, result[1] if direct else gemm.N),
        "SPLITS": plan.splits,
        "ACTIVATION": request.epilogue.activation,
        "POOL": p.pool,
        "PRECISION": "apart" if _adds_apart(request) else plan.precision,
        "INDEX": index_type(max(map(reach, request.shapes, (source, weight, output)))),
        **tile_options(plan),
        **request.compile_options,
    }
    programs = grid(p, request.direction, plan)
    tiles = math.prod(programs) // plan.splits
    workspace = split_k_workspace(plan, tiles, request.sum_dtype)
    constants = compile_time(kernels.conv2d_gather_kernel, options)

    def run(
        first, second, out, bias, residual, statistics, negative_slope, z=None, other=None, norm=None, requantize=None
    ) -> None:
        device = out.device
        arguments = (
            Image(first, *source),
            Filter(second, *of_filter),
            bias,
            residual,
            Image(out, *output),
            statistics,
            z,
            other,
            norm,
            workspace(device) if workspace else None,
            requantize,
            sizes,
            p.padding[0],
            p.padding[2],
            negative_slope,
        )
        launch(kernels.conv2d_gather_kernel, programs, device, arguments, constants)

    # Tiles along the pixels of every phase; an empty batch has none.
    rows = max(cdiv(gemm.M, plan.block_m) * tiled_pixels(p, request.direction)[1], 1)
    of_statistics = Tiles(rows, tiles // rows) if request.epilogue.leaves_parts else None
    return Launch(run, of_statistics, counters=tiles if workspace else 0)


def _adds_apart(request: Request) -> bool:
    """Whether sums of float8 leave the tensor cores by an instruction of the kernel's own."""
    return request.dtype is torch.float8_e4m3fn and not request.device.multiplies_from_shared_memory


def _prepare_weight_grad(request: Request, plan: ConvPlan) -> Launch:
    p = request.problem
    grad, source, output = map(strides_of, request.shapes, (request.first, request.second, request.output))
    of_filter = filter_strides(p, output, False)
    gemm = gemm_mnk(p, Direction.WEIGHT_GRAD)
    direct = plan.variant is Variant.DIRECT
    programs, size = grid(p, Direction.WEIGHT_GRAD, plan), plan.block_m * plan.block_n
    workspace = shared_sums(math.prod(programs) // plan.splits, plan.splits, size)
    scalars = (
        Sizes(p.N, p.H, p.W, p.P, p.Q, p.groups, p.group_outputs, p.group_inputs),
        cdiv(gemm.K, plan.splits),
        p.padding[0],
        p.padding[2],
        fan_in(plan.splits, size),
    )
    options = {
        **window_options(p),
        "VARIANT": plan.variant.value,
        "GRAD_ALIGN": alignment(grad, 1, p.K if direct else p.group_outputs),
        "SOURCE_ALIGN": alignment(source, 1, p.C if direct else p.group_inputs),
        "CHUNK": chunk(size, plan.num_warps),
        "PRECISION": plan.precision,
        "INDEX": index_type(max(map(reach, request.shapes[:2], (grad, source)))),
        **tile_options(plan),
    }
    constants = compile_time(weight_kernels.conv2d_weight_grad_kernel, options)

    def run(first, second, out, *_) -> None:
        shared = workspace(out.device)
        arguments = (Image(first, *grad), Image(second, *source), Filter(out, *of_filter), shared, *scalars)
        launch(weight_kernels.conv2d_weight_grad_kernel, programs, out.device, arguments, constants)

    return Launch(run)


def tile_options(plan: ConvPlan) -> dict[str, Any]:
    return {
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "BLOCK_K": plan.block_k,
        "GROUP_M": plan.group_m,
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
    }
