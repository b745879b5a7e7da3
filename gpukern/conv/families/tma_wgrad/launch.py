"""Launches of the weight gradient over boxes of one pixel of many images."""

from __future__ import annotations

import torch

from gpukern.conv.families.tma_wgrad import kernels
from gpukern.conv.families.tma_wgrad.plan import tile_count, together
from gpukern.conv.layouts import Shape, Strides
from gpukern.conv.plan import ConvPlan
from gpukern.conv.request import Launch, Request
from gpukern.ops._reduction.launch import shared_sums
from gpukern.ops._reduction.splits import chunk, fan_in
from gpukern.runtime.descriptor import Described, channel_run_strides
from gpukern.runtime.launcher import compile_time, launch


def prepare(request: Request, plan: ConvPlan) -> Launch:
    p, dtype = request.problem, request.dtype
    taps, channels = p.R * p.S, plan.block_n // together(plan)
    of_grad, of_source, _ = request.shapes
    grad = _batch_inside(of_grad, request.first, (plan.block_k, plan.block_m), dtype)
    source = _batch_inside(of_source, request.second, (plan.block_k, channels), dtype)
    grad, source = (described.operand(dtype, plan.precision) for described in (grad, source))
    output = Described((p.K, taps, p.C), (taps * p.C, p.C, 1), (plan.block_m, 1, channels)).checked(dtype)
    programs, size = (tile_count(p, plan), plan.splits), plan.block_m * plan.block_n
    workspace = shared_sums(*programs, size)
    scalars = (p.N, p.H, p.W, p.P, p.Q, p.K, p.C, p.padding[0], p.padding[2], fan_in(plan.splits, size))
    options = {
        "TAPS_H": p.R,
        "TAPS_W": p.S,
        "STRIDE_H": p.stride[0],
        "STRIDE_W": p.stride[1],
        "DILATION_H": p.dilation[0],
        "DILATION_W": p.dilation[1],
        "BLOCK_M": plan.block_m,
        "TOGETHER": together(plan),
        "BLOCK_N": channels,
        "BLOCK_K": plan.block_k,
        "GROUP_M": plan.group_m,
        "CHUNK": chunk(size, plan.num_warps),
        "PRECISION": plan.precision,
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
    }
    constants = compile_time(kernels.conv2d_batch_box_weight_grad_kernel, options)

    def run(first, second, out, *_) -> None:
        shared = workspace(out.device)
        target = out if shared else output.of(out)
        arguments = (grad.of(first), source.of(second), target, shared, *scalars)
        launch(kernels.conv2d_batch_box_weight_grad_kernel, programs, out.device, arguments, constants)

    return Launch(run)


def _batch_inside(shape: Shape, strides: Strides, box: tuple[int, int], dtype: torch.dtype) -> Described:
    """Describe images [N, C, H, W] with runs of channels as [H, W, N, C]; boxes are (images, channels) of one pixel."""
    N, C, H, W = shape
    n, c, h, w = channel_run_strides(shape, strides, dtype)
    return Described((H, W, N, C), (h, w, n, c), (1, 1, *box))
