"""Launches of the convolution of few channels: one pass that packs x and w, then the products."""

from __future__ import annotations

import torch

from gpukern.conv.families.tma_conv.plan import box_count, stored, tile_count
from gpukern.conv.families.tma_stem import kernels
from gpukern.conv.families.tma_stem.plan import packed, window
from gpukern.conv.indexing import Sizes
from gpukern.conv.plan import ConvPlan
from gpukern.conv.request import Launch, Request, Tiles
from gpukern.ops._images import Image, strides_of
from gpukern.runtime.descriptor import Described, channel_run_strides
from gpukern.runtime.integers import cdiv, power_of_two
from gpukern.runtime.launcher import compile_time, index_type, launch
from gpukern.runtime.strides import reach

# A thread packs two pixels.
_PACKED_PIXELS = 256
_PACKED_FILTERS = 16


def prepare(request: Request, plan: ConvPlan) -> Launch:
    p, dtype, itemsize = request.problem, request.dtype, request.dtype.itemsize
    box, block_n, block_k = plan.own_box, plan.block_n, plan.block_k
    of_packed, channels = packed(p, itemsize), packed(p, itemsize).channels
    of_source, of_filter, _ = request.shapes
    source, filter = map(strides_of, request.shapes[:2], (request.first, request.second))

    row = of_packed.cols * channels
    step_n, step_p, step_q = of_packed.rows * row, p.stride[0] * row, p.stride[1] * channels
    windows = Described(
        (p.N, p.P, p.R, p.Q, window(p, itemsize)),
        (step_n, step_p, row, step_q, 1),
        (box[0], box[1], 1, box[2], block_k),
    ).operand(dtype, plan.precision)
    filter_rows = Described((p.R, p.K, block_k), (p.K * block_k, block_k, 1), (1, block_n, block_k))
    filter_rows = filter_rows.operand(dtype, plan.precision)
    n, k, h, w = channel_run_strides(request.shapes[2], request.output, request.dtypes[2])
    height, width = request.shapes[2][2:]
    out = Described((p.N, height, width, p.K), (n, h, w, k), (*stored(p, box), block_n))
    out.checked(request.dtypes[2])

    pack_grid = (cdiv(of_packed.elements // channels, _PACKED_PIXELS) + p.R * cdiv(p.K, _PACKED_FILTERS),)
    pack_scalars = (
        Sizes(p.N, p.H, p.W, of_packed.rows, of_packed.cols, 1, p.K, p.C),
        p.padding[0],
        p.padding[2],
        p.R,
        p.S,
    )
    pack_options = {
        "CHANNELS": channels,
        "BLOCK_K": block_k,
        "BLOCK_M": _PACKED_PIXELS,
        "BLOCK_N": _PACKED_FILTERS,
        "BLOCK_C": power_of_two(channels),
        "INDEX": index_type(max(reach(of_source, source), reach(of_filter, filter), of_packed.elements)),
        "num_warps": 4,
    }
    grid, scalars = (tile_count(p, request.direction, plan),), (p.N, p.P, p.Q, p.K)
    options = {
        "TAPS_H": p.R,
        **dict(zip(("BOX_N", "BOX_H", "BOX_W"), box, strict=True)),
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP_M": plan.group_m,
        "ACTIVATION": request.epilogue.activation,
        "POOL": p.pool,
        "PRECISION": plan.precision,
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
        **request.compile_options,
    }
    pack_constants = compile_time(kernels.stem_pack_kernel, pack_options)
    constants = compile_time(kernels.conv2d_stem_kernel, options)

    def run(first, second, output, bias, residual, statistics, negative_slope, *_, requantize=None) -> None:
        device = output.device
        image = torch.empty(of_packed.elements, dtype=dtype, device=device)
        rows = torch.empty(p.R * p.K * block_k, dtype=dtype, device=device)
        pack_arguments = (Image(first, *source), Image(second, *filter), image, rows, *pack_scalars)
        launch(kernels.stem_pack_kernel, pack_grid, device, pack_arguments, pack_constants)
        arguments = (
            windows.of(image),
            filter_rows.of(rows),
            bias,
            None if residual is None else out.of(residual),
            out.of(output),
            statistics,
            requantize,
            *scalars,
            negative_slope,
        )
        launch(kernels.conv2d_stem_kernel, grid, device, arguments, constants)

    boxes = box_count(p, request.direction, box)
    return Launch(run, Tiles(boxes, grid[0] // boxes) if request.epilogue.statistics else None)
