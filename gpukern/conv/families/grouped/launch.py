"""Launches the block-diagonal kernel: forward and input gradient of grouped convolutions."""

from __future__ import annotations

from gpukern.conv.families.filters import filter_strides, tap_options, window_options
from gpukern.conv.families.grouped import kernels
from gpukern.conv.families.grouped.plan import grid
from gpukern.conv.geometry import gemm_mnk
from gpukern.conv.indexing import Filter, Sizes
from gpukern.conv.layouts import alignment
from gpukern.conv.plan import ConvPlan, Direction
from gpukern.conv.request import Launch, Request, Tiles
from gpukern.ops._images import Image, strides_of
from gpukern.runtime.launcher import compile_time, index_type, launch
from gpukern.runtime.strides import reach


def prepare(request: Request, plan: ConvPlan) -> Launch:
    p, transposed = request.problem, request.direction is Direction.INPUT_GRAD
    of_source, _, of_output = request.shapes
    source, weight, output = map(strides_of, request.shapes, (request.first, request.second, request.output))
    gemm = gemm_mnk(p, request.direction)
    of_filter = filter_strides(p, weight, transposed)
    sizes = Sizes(p.N, *of_source[2:], *of_output[2:], p.groups, gemm.N, gemm.K)
    options = {
        **window_options(p),
        **tap_options(p, transposed),
        "COLUMNS": gemm.N,
        "REDUCTION": gemm.K,
        "SOURCE_ALIGN": alignment(source, 1, of_source[1]),
        "FILTER_ALIGN": alignment(weight, 1, p.group_inputs),
        "OUT_ALIGN": alignment(output, 1, of_output[1]),
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "BLOCK_K": plan.block_k,
        "ACTIVATION": request.epilogue.activation,
        "PRECISION": plan.precision,
        "INDEX": index_type(max(map(reach, request.shapes, (source, weight, output)))),
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
    }
    rows, cols, phases = grid(p, request.direction, plan)
    constants = compile_time(kernels.conv2d_block_diagonal_kernel, options)

    def run(first, second, out, bias, residual, statistics, negative_slope, z=None, other=None, norm=None) -> None:
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
            sizes,
            p.padding[0],
            p.padding[2],
            negative_slope,
        )
        launch(kernels.conv2d_block_diagonal_kernel, (rows * cols, phases), out.device, arguments, constants)

    return Launch(run, Tiles(rows * phases, cols) if request.epilogue.leaves_parts else None)
