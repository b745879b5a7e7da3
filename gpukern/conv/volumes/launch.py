"""Convolutions of volumes by the kernels, in functions of the same names and signatures as ``reference.py``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from gpukern.conv.families.filters import filter_alignment, filter_strides, tap_steps
from gpukern.conv.families.implicit_gemm.launch import tile_options
from gpukern.conv.families.split_k import split_k_workspace
from gpukern.conv.launch import prepared_for, write, write_empty_sums
from gpukern.conv.layouts import Strides, alignment
from gpukern.conv.plan import ConvPlan, Direction, Layout, Operands, Pack, Variant
from gpukern.conv.request import Epilogue, check_countable
from gpukern.conv.volumes import kernels, weight_kernels
from gpukern.conv.volumes.indexing import Filter, Sizes
from gpukern.conv.volumes.patches.launch import prepare as prepare_product
from gpukern.conv.volumes.patches.planner import is_product
from gpukern.conv.volumes.planner import grid, plan
from gpukern.conv.volumes.problem import VolumeProblem
from gpukern.conv.volumes.views import images_of
from gpukern.ops._images import Volume, strides_of
from gpukern.ops._reduction.launch import channels_last_copy, copy_image, shared_sums
from gpukern.ops._reduction.splits import chunk, fan_in
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.integers import cdiv
from gpukern.runtime.launcher import compile_time, index_type, launch
from gpukern.runtime.precision import conv_precision
from gpukern.runtime.strides import dense_strides, is_channels_last, reach
from gpukern.runtime.tensors import check_kernel_dtype

#: Starts a kernel: (first, second, output, bias, residual, negative_slope), None for absent ones.
Run = Callable[..., None]


def conv3d(
    problem: VolumeProblem,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    last = _is_channels_last(input) or _is_channels_last(weight)
    return _compute(problem, Direction.FORWARD, input, weight, last, bias, residual, activation, negative_slope)


def conv_transpose3d(
    problem: VolumeProblem,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    last = _is_channels_last(input) or _is_channels_last(weight)
    return _compute(problem, Direction.INPUT_GRAD, input, weight, last, bias, residual, activation, negative_slope)


def conv3d_input_grad(
    problem: VolumeProblem, grad: torch.Tensor, weight: torch.Tensor, channels_last: bool
) -> torch.Tensor:
    return _compute(problem, Direction.INPUT_GRAD, grad, weight, channels_last)


def conv3d_weight_grad(
    problem: VolumeProblem, grad: torch.Tensor, input: torch.Tensor, channels_last: bool
) -> torch.Tensor:
    return _compute(problem, Direction.WEIGHT_GRAD, grad, input, channels_last)


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return is_channels_last(tensor.shape, tensor.stride())


def _compute(
    problem: VolumeProblem,
    direction: Direction,
    first: torch.Tensor,
    second: torch.Tensor,
    channels_last: bool,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.0,
) -> torch.Tensor:
    check_kernel_dtype("conv3d", first.dtype)
    *_, shape = _shapes(problem, direction)
    output = first.new_empty_strided(shape, dense_strides(shape, channels_last))
    if output.numel() == 0:
        return output
    if first.numel() == 0:
        write_empty_sums(activation, output, bias, residual, negative_slope)
        return output
    images = images_of(problem, direction, first, second, output, residual, channels_last)
    if images is not None:
        epilogue = Epilogue(activation, residual is not None)
        prepared = prepared_for(images.problem, direction, images.first, images.second, channels_last, epilogue)
        write(prepared, images.output, images.first, images.second, bias, images.residual, negative_slope)
        return output
    run, pack = _prepare(
        problem,
        direction,
        first.stride(),
        second.stride(),
        output.stride(),
        None if residual is None else residual.stride(),
        activation,
        first.dtype,
        conv_precision(first.dtype),
        device_spec(first.device),
    )
    if bias is not None:
        bias = bias.contiguous()
    pack_first, pack_second, pack_output = pack
    if pack_first:
        first = _packed(first)
    if pack_second:
        second = _packed(second)
    written = output
    if pack_output:
        written = first.new_empty_strided(shape, dense_strides(shape, True))
    run(first, second, written, bias, residual, negative_slope)
    if pack_output:
        copy_image(written.flatten(2, 3), output.flatten(2, 3))
    return output


def _packed(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in channels_last_3d."""
    return channels_last_copy(tensor.flatten(2, 3)).unflatten(2, tensor.shape[2:4])


def _shapes(p: VolumeProblem, direction: Direction) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of first, second and output."""
    x, w, y = p.shapes
    return {Direction.FORWARD: (x, w, y), Direction.INPUT_GRAD: (y, w, x), Direction.WEIGHT_GRAD: (y, x, w)}[direction]


@functools.lru_cache(maxsize=4096)
def _prepare(
    p: VolumeProblem,
    direction: Direction,
    first: Strides,
    second: Strides,
    written: Strides,
    added: Strides | None,
    activation: str,
    dtype: torch.dtype,
    precision: str,
    device: DeviceSpec,
) -> tuple[Run, Pack]:
    """Return the launch of the kernel that serves the problem best, and which tensors are copied before and after."""
    name = str(dtype).removeprefix("torch.")
    if is_product(p, direction) and added in (None, written):
        run = prepare_product(p, direction, first, second, written, activation, name, precision, device)
        return run, (False, False, False)
    shapes = _shapes(p, direction)
    check_countable(p.shapes[0], p.shapes[2], operation="conv3d")
    given = tuple(map(strides_of, shapes, (first, second, written)))
    of_first, of_second, of_output = (Layout.NHWC if strides[1] in (0, 1) else Layout.STRIDED for strides in given)
    chosen = plan(p, direction, Operands(name, precision, of_first, of_second, of_output), device)
    first, second, written = (
        strides_of(shape, dense_strides(shape, True)) if packed else strides
        for shape, strides, packed in zip(shapes, given, chosen.pack, strict=True)
    )
    if direction is Direction.WEIGHT_GRAD:
        return _prepare_weight_grad(p, first, second, written, chosen), chosen.pack
    residual = None if added is None else strides_of(shapes[2], added)
    return _prepare_gather(p, direction, first, second, written, residual, activation, chosen), chosen.pack


def _prepare_gather(
    p: VolumeProblem,
    direction: Direction,
    source: Strides,
    weight: Strides,
    output: Strides,
    residual: Strides | None,
    activation: str,
    chosen: ConvPlan,
) -> Run:
    transposed = direction is Direction.INPUT_GRAD
    shapes = source_shape, _, result_shape = _shapes(p, direction)
    direct = chosen.variant is Variant.DIRECT
    columns, channels = p.group_outputs, p.group_inputs
    if transposed:
        columns, channels = channels, columns
    of_filter = filter_strides(p, weight, transposed)
    source_sizes, result_sizes = (p.result, p.image) if transposed else (p.image, p.result)
    sizes = Sizes(p.N, *source_sizes, *result_sizes, p.groups, columns, channels)
    run_out = result_shape[1] if direct else columns
    offsets = [reach(shape, strides) for shape, strides in zip(shapes, (source, weight, output), strict=True)]
    if residual is not None:
        offsets.append(reach(result_shape, residual))
    options = {
        **_window_options(p),
        "TAP_STEPS": tap_steps(p, transposed),
        "TRANSPOSED": transposed,
        "VARIANT": chosen.variant.value,
        "EVEN_K": channels % chosen.block_k == 0,
        "SOURCE_ALIGN": alignment(source, 1, source_shape[1] if direct else channels),
        "FILTER_ALIGN": filter_alignment(p, weight),
        "OUT_ALIGN": alignment(output, 1, run_out),
        "RESIDUAL_ALIGN": 1 if residual is None else alignment(residual, 1, run_out),
        "SPLITS": chosen.splits,
        "ACTIVATION": activation,
        "PRECISION": chosen.precision,
        "INDEX": index_type(max(offsets)),
        **tile_options(chosen),
    }
    programs = grid(p, direction, chosen)
    workspace = split_k_workspace(chosen, math.prod(programs) // chosen.splits)
    constants = compile_time(kernels.conv3d_gather_kernel, options)

    def run(first, second, out, bias, residual_tensor, negative_slope) -> None:
        partial = counters = None
        if workspace:
            partial, counters = workspace(out.device)
        arguments = (
            Volume(first, *source),
            Filter(second, *of_filter),
            bias,
            None if residual is None else Volume(residual_tensor, *residual),
            Volume(out, *output),
            partial,
            counters,
            sizes,
            *p.before,
            negative_slope,
        )
        launch(kernels.conv3d_gather_kernel, programs, out.device, arguments, constants)

    return run


def _prepare_weight_grad(p: VolumeProblem, grad: Strides, source: Strides, output: Strides, chosen: ConvPlan) -> Run:
    direction = Direction.WEIGHT_GRAD
    x, _, y = p.shapes
    direct = chosen.variant is Variant.DIRECT
    of_filter = filter_strides(p, output, False)
    voxels = p.N * math.prod(p.result)
    programs, size = grid(p, direction, chosen), chosen.block_m * chosen.block_n
    workspace = shared_sums(math.prod(programs) // chosen.splits, chosen.splits, size)
    scalars = (
        Sizes(p.N, *p.image, *p.result, p.groups, p.group_outputs, p.group_inputs),
        cdiv(voxels, chosen.splits),
        *p.before,
        fan_in(chosen.splits, size),
    )
    options = {
        **_window_options(p),
        "VARIANT": chosen.variant.value,
        "GRAD_ALIGN": alignment(grad, 1, p.K if direct else p.group_outputs),
        "SOURCE_ALIGN": alignment(source, 1, p.C if direct else p.group_inputs),
        "CHUNK": chunk(size, chosen.num_warps),
        "PRECISION": chosen.precision,
        "INDEX": index_type(max(reach(y, grad), reach(x, source))),
        **tile_options(chosen),
    }
    constants = compile_time(weight_kernels.conv3d_weight_grad_kernel, options)

    def run(first, second, out, *_: Any) -> None:
        arguments = Volume(first, *grad), Volume(second, *source), Filter(out, *of_filter), workspace(out.device)
        launch(weight_kernels.conv3d_weight_grad_kernel, programs, out.device, (*arguments, *scalars), constants)

    return run


def _window_options(p: VolumeProblem) -> dict[str, Any]:
    return {"TAPS": p.taps, "STRIDES": p.stride, "DILATIONS": p.dilation}
