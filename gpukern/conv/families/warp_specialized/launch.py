"""Launches of the warp-specialised kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gpukern.conv.families.tma_conv.plan import box_count, output_sizes, tile_count
from gpukern.conv.families.warp_specialized import kernels
from gpukern.conv.geometry import gemm_mnk
from gpukern.conv.layouts import Shape, Strides
from gpukern.conv.plan import ConvPlan, Direction
from gpukern.conv.request import Launch, Request, Tiles
from gpukern.runtime.descriptor import Described, channel_run_strides
from gpukern.runtime.launcher import compile_time, launch

_ELEMENTS = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


@dataclass(frozen=True)
class _Swizzled(Described):
    """A descriptor that also gives a box's layout in shared memory, which Gluon leaves to the caller."""

    layout: gl.NVMMASharedLayout

    def of(self, tensor: torch.Tensor) -> TensorDescriptor:
        # Not the constructor: see Described.
        descriptor = TensorDescriptor.__new__(TensorDescriptor)
        descriptor.__dict__.update(super().of(tensor).__dict__, layout=self.layout)
        return descriptor


def prepare(request: Request, plan: ConvPlan) -> Launch:
    p, direction = request.problem, request.direction
    transposed = direction is Direction.INPUT_GRAD
    box, block_n, block_k = plan.own_box, plan.block_n, plan.block_k
    of_source, of_filter, of_out = request.shapes
    nhwc, rskc = (0, 2, 3, 1), (2, 3, 0, 1)
    sides = (block_k, block_n) if transposed else (block_n, block_k)
    source = _described(of_source, request.first, nhwc, (*box, block_k), request.dtype)
    filter = _described(of_filter, request.second, rskc, (1, 1, *sides), request.dtype)
    out = _described(of_out, request.output, nhwc, (*box, block_n), request.dtype)

    gemm = gemm_mnk(p, direction)
    # In the input gradient, taps go backwards: source row = row + top − r · dilation.
    sign = -1 if transposed else 1
    steps = (sign * p.dilation[0], sign * p.dilation[1], sign * p.padding[0], sign * p.padding[2])
    window = kernels.Window(*output_sizes(p, direction), gemm.N, gemm.K, p.R, p.S, *steps)
    options = {
        "TRANSPOSED": transposed,
        "BUFFERS": plan.num_stages,
        "GROUP_M": plan.group_m,
        "ACTIVATION": request.epilogue.activation,
        "num_warps": plan.num_warps,
    }
    tiles = tile_count(p, direction, plan)
    grid = (min(tiles, request.device.sm_count),)
    constants = compile_time(kernels.conv2d_warp_specialized_kernel, options)

    def run(first, second, output, bias, residual, statistics, negative_slope) -> None:
        arguments = (
            source.of(first),
            filter.of(second),
            out.of(output),
            None if residual is None else out.of(residual),
            bias,
            statistics,
            window,
            negative_slope,
        )
        launch(kernels.conv2d_warp_specialized_kernel, grid, output.device, arguments, constants)

    boxes = box_count(p, direction, box)
    return Launch(run, Tiles(boxes, tiles // boxes) if request.epilogue.statistics else None)


def _described(
    shape: Shape, strides: Strides, order: tuple[int, ...], block: tuple[int, ...], dtype: torch.dtype
) -> _Swizzled:
    """Describe a tensor with its dimensions in ``order``, the last of which is contiguous."""
    strides = channel_run_strides(shape, strides, dtype)
    layout = gl.NVMMASharedLayout.get_default_for(list(block), _ELEMENTS[dtype])
    described = _Swizzled(tuple(shape[i] for i in order), tuple(strides[i] for i in order), block, layout)
    return described.checked(dtype)
