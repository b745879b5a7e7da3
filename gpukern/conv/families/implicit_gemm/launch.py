"""Launches the gather kernels: forward, input gradient, weight gradient."""

from __future__ import annotations

import math
from typing import Any

import torch

from gpukern.conv.families.implicit_gemm import kernels, weight_kernels
from gpukern.conv.families.implicit_gemm.plan import grid
from gpukern.conv.geometry import tiled_pixels
from gpukern.conv.indexing import Filter, Sizes
from gpukern.conv.layouts import Strides, alignment
from gpukern.conv.plan import ConvPlan, Direction, Variant
from gpukern.conv.problem import ConvProblem
from gpukern.conv.request import Launch, Request
from gpukern.ops._images import Image, strides_of
from gpukern.ops._reduction.launch import add_partial_sums, partial_sums
from gpukern.runtime.counters import zeroed_counters
from gpukern.runtime.integers import cdiv
from gpukern.runtime.launcher import compile_time, index_type, launch, reach


def prepare(request: Request, choice: ConvPlan) -> Launch:
    if request.direction is Direction.WEIGHT_GRAD:
        return _prepare_weight_grad(request, choice)
    return _prepare_gather(request, choice)


def _prepare_gather(request: Request, choice: ConvPlan) -> Launch:
    p, transposed = request.problem, request.direction is Direction.INPUT_GRAD
    image, _, result = request.shapes
    source, weight, output = map(strides_of, request.shapes, (request.first, request.second, request.output))
    columns, reduction = p.group_outputs, p.group_inputs
    if transposed:
        columns, reduction = reduction, columns
    direct = choice.variant is Variant.DIRECT
    of_filter = filter_strides(p, weight, transposed)
    sizes = Sizes(p.N, *image[2:], *result[2:], p.groups, columns, reduction)
    options = {
        **window_options(p),
        **tap_options(p, transposed),
        "VARIANT": choice.variant.value,
        "EVEN_K": reduction % choice.block_k == 0,
        "SOURCE_ALIGN": alignment(source, 1, image[1] if direct else reduction),
        "FILTER_ALIGN": _filter_alignment(weight, p),
        "OUT_ALIGN": alignment(output, 1, result[1] if direct else columns),
        "SPLITS": choice.splits,
        "ACTIVATION": request.epilogue.activation,
        "POOL": p.pool,
        "PRECISION": choice.precision,
        "INDEX": index_type(max(map(reach, request.shapes, (source, weight, output)))),
        **_tile(choice),
    }
    programs = grid(p, request.direction, choice)
    tiles = math.prod(programs) // choice.splits
    partial_size = tiles * choice.splits * choice.block_m * choice.block_n if choice.splits > 1 else 0
    constants = compile_time(kernels.conv2d_gather_kernel, options)

    def run(first, second, out, bias, residual, statistics, negative_slope) -> None:
        device = out.device
        partial = counters = None
        if partial_size:
            partial = torch.empty(partial_size, dtype=torch.float32, device=device)
            counters = zeroed_counters(tiles, device)
        arguments = (
            Image(first, *source),
            Filter(second, *of_filter),
            bias,
            residual,
            Image(out, *output),
            statistics,
            partial,
            counters,
            sizes,
            p.padding[0],
            p.padding[2],
            negative_slope,
        )
        launch(kernels.conv2d_gather_kernel, programs, device, arguments, constants)

    pixels, _ = tiled_pixels(p, request.direction)
    return Launch(run, cdiv(pixels, choice.block_m) if request.epilogue.statistics else 0)


def _prepare_weight_grad(request: Request, choice: ConvPlan) -> Launch:
    p = request.problem
    grad, source, output = map(strides_of, request.shapes, (request.first, request.second, request.output))
    of_filter = filter_strides(p, output, False)
    pixels, _ = tiled_pixels(p, Direction.WEIGHT_GRAD)
    direct = choice.variant is Variant.DIRECT
    scalars = (
        math.prod(request.shapes[2]),
        Sizes(p.N, p.H, p.W, p.P, p.Q, p.groups, p.group_outputs, p.group_inputs),
        cdiv(pixels, choice.splits),
        p.padding[0],
        p.padding[2],
    )
    options = {
        **window_options(p),
        "VARIANT": choice.variant.value,
        "GRAD_ALIGN": alignment(grad, 1, p.K if direct else p.group_outputs),
        "SOURCE_ALIGN": alignment(source, 1, p.C if direct else p.group_inputs),
        "PRECISION": choice.precision,
        "INDEX": index_type(max(map(reach, request.shapes[:2], (grad, source)))),
        **_tile(choice),
    }
    programs = grid(p, Direction.WEIGHT_GRAD, choice)
    constants = compile_time(weight_kernels.conv2d_weight_grad_kernel, options)

    def run(first, second, out, *_) -> None:
        partial = partial_sums(out, choice.splits)
        arguments = (Image(first, *grad), Image(second, *source), Filter(partial, *of_filter), *scalars)
        launch(weight_kernels.conv2d_weight_grad_kernel, programs, out.device, arguments, constants)
        add_partial_sums(partial, out, choice.splits)

    return Launch(run)


def _filter_alignment(weight: Strides, problem: ConvProblem) -> int:
    """:func:`alignment` of a filter, whose runs may lie along C/groups or along K."""
    if weight[1] == 1:
        return alignment(weight, 1, 16)
    # Along K a group starts after group_outputs elements.
    return alignment(weight, 0, 16 if problem.groups == 1 else problem.group_outputs)


def filter_strides(problem: ConvProblem, weight: Strides, transposed: bool) -> Strides:
    """Of ``indexing.Filter``, from those of [K, C/groups, R, S]."""
    k, c, r, s = weight
    group = problem.group_outputs * k
    return (group, c, k, r, s) if transposed else (group, k, c, r, s)


def tap_options(problem: ConvProblem, transposed: bool) -> dict[str, int]:
    """How far apart the taps of a phase lie in the filter, see ``indexing``."""
    steps = (1, 1)
    if transposed:
        steps = tuple(s // math.gcd(s, d) for s, d in zip(problem.stride, problem.dilation, strict=True))
    return {"TAP_STEP_H": steps[0], "TAP_STEP_W": steps[1], "TRANSPOSED": transposed}


def window_options(problem: ConvProblem) -> dict[str, int]:
    return {
        "TAPS_H": problem.R,
        "TAPS_W": problem.S,
        "STRIDE_H": problem.stride[0],
        "STRIDE_W": problem.stride[1],
        "DILATION_H": problem.dilation[0],
        "DILATION_W": problem.dilation[1],
    }


def _tile(choice: ConvPlan) -> dict[str, Any]:
    return {
        "BLOCK_M": choice.block_m,
        "BLOCK_N": choice.block_n,
        "BLOCK_K": choice.block_k,
        "GROUP_M": choice.group_m,
        "num_warps": choice.num_warps,
        "num_stages": choice.num_stages,
    }
