"""Layer and RMS norm by the kernels, in functions of the same names and signatures as ``reference.py``."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from gpukern.ops._activation.properties import PROPERTIES
from gpukern.ops._batch_norm.functions import Sizes
from gpukern.ops._layer_norm import kernels, planner
from gpukern.ops._layer_norm.functions import Operand
from gpukern.ops._layer_norm.problem import Norm, Shape, Walk, walk
from gpukern.ops._reduction.functions import Statistics, Sums
from gpukern.ops._reduction.launch import shared_sums, with_workspace
from gpukern.ops._reduction.splits import chunk, fan_in
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.launcher import index_type, launch
from gpukern.runtime.strides import reach
from gpukern.runtime.tensors import check_kernel_dtype

_NOTHING = Operand(None, 0, 0, 0, 0, None)


def normalize(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm: Norm,
) -> torch.Tensor:
    _check_dtypes(norm, input, weight)
    output = input.new_empty(input.shape, dtype=norm.dtype)
    if not output.numel():
        return output
    given = _operands(norm.dims, input, residual, output)
    parameters = _flat(weight), _flat(bias)
    options = {"CENTERED": norm.centered, "ACTIVATION": norm.activation} | given.options
    device, scalars = input.device, (norm.eps, norm.negative_slope)
    if planner.fits(given.walk.columns, False, residual is not None or norm.activation != "none"):
        read = tuple(t.itemsize for t in (input, residual) if t is not None)
        plan = planner.row_plan(given.walk, read, device_spec(device), False)
        launch(
            kernels.layer_norm_row_kernel,
            (plan.programs,),
            device,
            (*given.operands, *parameters, given.sizes(plan.blocks), plan.steps, plan.steps_per_program, *scalars),
            _row_options(plan) | options,
        )
        return output
    statistics = _statistics(given.operands[0], given, norm, device)
    tiles = planner.tile_plan(given.walk, device_spec(device), False)
    launch(
        kernels.layer_norm_kernel,
        (tiles.steps * tiles.column_tiles,),
        device,
        (*given.operands, statistics, *parameters, given.sizes(tiles.blocks, tiles.column_tiles), *scalars),
        {"BLOCK_R": tiles.rows, "BLOCK_C": tiles.columns, "num_warps": tiles.warps} | options,
    )
    return output


def normalize_backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    other: torch.Tensor | None,
    norm: Norm,
    wants_input: bool,
    wants_parameters: bool,
    wants_inner: bool,
) -> tuple[torch.Tensor, ...]:
    _check_dtypes(norm, input, weight)
    out = input.new_empty(input.shape) if wants_input else None
    inner = grad.new_empty(input.shape) if wants_inner else None
    grad_weight, grad_bias = (
        None if not wants_parameters or t is None else t.new_empty(t.shape) for t in (weight, bias)
    )
    results = tuple(input.new_empty(0) if t is None else t for t in (out, grad_weight, grad_bias, inner))
    if not input.numel():
        for tensor in results:
            tensor.zero_()
        return results
    given = _operands(norm.dims, grad, input, other, inner, out)
    parameters = _flat(weight), _flat(bias)
    gradients = grad_weight, grad_bias
    needs_input = norm.activation != "none" and PROPERTIES[norm.activation].needs_input
    options = {"CENTERED": norm.centered, "ACTIVATION": norm.activation, "NEEDS_INPUT": needs_input} | given.options
    if planner.fits(given.walk.columns, True, True):
        read = tuple(t.itemsize for t in (grad, input, other) if t is not None)
        _by_rows(given, parameters, gradients, norm, read, options, input.device)
    else:
        _by_chunks(given, parameters, gradients, norm, options, input.device)
    return results


def _by_rows(given: Given, parameters, gradients, norm: Norm, read: tuple[int, ...], options, device) -> None:
    """One launch, which reads each tensor once."""
    plan = planner.row_plan(given.walk, read, device_spec(device), True)
    sums = sum(each is not None for each in gradients)
    shared = group = None
    if sums:
        shared = shared_sums(1, plan.programs, sums * plan.columns)(device)
        group = fan_in(plan.programs, sums * plan.columns)
    launch(
        kernels.layer_norm_row_backward_kernel,
        (plan.programs,),
        device,
        (
            *(*given.operands, *parameters, *gradients, shared, group),
            *(given.sizes(plan.blocks), plan.steps, plan.steps_per_program, norm.eps, norm.negative_slope),
        ),
        {"CHUNK": chunk(plan.columns, 8)} | _row_options(plan) | options,
    )


def _by_chunks(given: Given, parameters, gradients, norm: Norm, options, device) -> None:
    """Statistics, sums over each row, and the rest, which reads all once more."""
    grad, x, other, _, out = given.operands
    statistics = _statistics(x, given, norm, device)
    rows, scalars = given.walk.rows, (norm.eps, norm.negative_slope)
    totals = None
    if out.ptr is not None:
        totals = torch.empty((2, rows), dtype=torch.float32, device=device)
        chunks = planner.chunk_plan(given.walk, device_spec(device))
        sums = Sums(totals=totals)
        if chunks.splits > 1:
            sums = with_workspace(sums, rows, device, chunks.splits, rows, sums=2)
        launch(
            kernels.layer_norm_row_sums_kernel,
            (rows * chunks.splits,),
            device,
            (
                *(grad, x, other, statistics, *parameters, sums, given.sizes(given.walk.inner)),
                *(rows, chunks.splits, chunks.chunks_per_split, *scalars),
            ),
            {"WHOLE": chunks.splits == 1, "BLOCK_C": chunks.columns, "num_warps": chunks.warps} | options,
        )
    grad_weight, grad_bias = gradients
    wants_sums = grad_weight is not None or grad_bias is not None
    tiles = planner.tile_plan(given.walk, device_spec(device), wants_sums)
    columns = Sums(grad_bias=grad_bias, grad_weight=grad_weight) if wants_sums else None
    if columns is not None and tiles.splits > 1:
        columns = with_workspace(columns, given.walk.columns, device, tiles.splits, tiles.column_tiles, sums=2)
    launch(
        kernels.layer_norm_backward_kernel,
        (tiles.splits * tiles.column_tiles,),
        device,
        (
            *(*given.operands, statistics, *parameters, totals, columns),
            *(given.sizes(tiles.blocks, tiles.column_tiles), rows),
            *(tiles.steps, tiles.steps_per_split, tiles.splits, *scalars),
        ),
        {"WHOLE": tiles.splits == 1, "BLOCK_R": tiles.rows, "BLOCK_C": tiles.columns, "num_warps": tiles.warps}
        | options,
    )


def _statistics(x: Operand, given: Given, norm: Norm, device: torch.device) -> Statistics:
    """Mean, from its first value, and variance of each long row."""
    rows = given.walk.rows
    mean, variance = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2))
    statistics = Statistics(mean=mean, variance=variance)
    plan = planner.chunk_plan(given.walk, device_spec(device))
    merged = statistics
    if plan.splits > 1:
        merged = with_workspace(statistics, rows, device, plan.splits, rows)
    launch(
        kernels.layer_norm_statistics_kernel,
        (rows * plan.splits,),
        device,
        (x, merged, given.sizes(given.walk.inner), rows, plan.splits, plan.chunks_per_split),
        {
            "CENTERED": norm.centered,
            "WHOLE": plan.splits == 1,
            "BLOCK_C": plan.columns,
            "num_warps": plan.warps,
        }
        | given.options,
    )
    return statistics


# ---- arguments -----------------------------------------------------------------------------------------------------


class Given(NamedTuple):
    """Tensors of one shape as kernels take them."""

    operands: tuple[Operand, ...]  # nothing where the tensor is None
    walk: Walk
    options: dict[str, Any]

    def sizes(self, blocks: int, column_tiles: int = 1) -> Sizes:
        path = self.walk
        groups = path.columns // path.column_align, path.inner // path.row_align
        return Sizes(*groups, path.height, blocks, column_tiles, path.rows)


def _operands(dims: int, *tensors: torch.Tensor | None) -> Given:
    given = [tensor for tensor in tensors if tensor is not None]
    shape = tuple(given[0].shape)
    try:
        path, places, options = _prepared(shape, dims, tuple(tensor.stride() for tensor in given))
    except ValueError:
        tensors = tuple(None if t is None else t.contiguous() for t in tensors)
        return _operands(dims, *tensors)
    remaining = iter(places)
    return Given(tuple(_NOTHING if t is None else Operand(t, *next(remaining)) for t in tensors), path, options)


@functools.lru_cache(maxsize=4096)
def _prepared(
    shape: Shape, dims: int, strides: tuple[Shape, ...]
) -> tuple[Walk, tuple[tuple[int | None, ...], ...], dict[str, Any]]:
    path = walk(shape, dims, strides)
    rows, columns = path.row_align, path.column_align
    places = tuple(
        (n // rows, h // rows, p, c // rows, 1) if run else (n // columns, h // columns, p // columns, c, None)
        for (n, h, p, c), run in zip(path.strides, path.rows_run, strict=True)
    )
    farthest = max(path.rows, *(reach(shape, stride) for stride in strides))
    return path, places, {"ROW_ALIGN": rows, "COLUMN_ALIGN": columns, "INDEX": index_type(farthest)}


def _row_options(plan: planner.RowPlan) -> dict[str, Any]:
    return {"STAGES": plan.stages, "BLOCK_R": plan.rows, "BLOCK_C": plan.columns, "num_warps": plan.warps}


def _check_dtypes(norm: Norm, *tensors: torch.Tensor | None) -> None:
    """An RMS norm's weight may have another dtype than its input."""
    for tensor in tensors:
        if tensor is not None:
            check_kernel_dtype("layer_norm" if norm.centered else "rms_norm", tensor.dtype)


def _flat(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Return a parameter contiguous, as kernels take these, and only these, without strides."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()
