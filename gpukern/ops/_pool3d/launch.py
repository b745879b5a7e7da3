"""Launches of the 3-D pooling kernels, in functions of the same names and signatures as ``reference.py``."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from gpukern.ops._images import Volume, strides_of
from gpukern.ops._pool2d import launch as images
from gpukern.ops._pool2d.problem import adaptive_problem
from gpukern.ops._pool3d import kernels
from gpukern.ops._pool3d.planner import Tile, plan, windows
from gpukern.ops._pool3d.problem import AdaptivePool, VolumePool
from gpukern.runtime.integers import cdiv
from gpukern.runtime.launcher import CompileTime, compile_time, index_type, launch
from gpukern.runtime.strides import reach
from gpukern.runtime.tensors import as_memory_format, check_kernel_dtype

Problem = VolumePool | AdaptivePool


def taps_dtype(kernel: tuple[int, ...]) -> torch.dtype:
    """Return the dtype of a tap (t·R + r)·S + s: a byte for windows of up to 256 elements. () of adaptive windows."""
    return torch.uint8 if kernel and math.prod(kernel) <= 256 else torch.int32


def max_pool3d(problem: Problem, input: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    output = _outputs(problem, input.dtype, input.device, memory_format)
    _max_pool3d(problem, input, output, output, WITH_TAPS=False)
    return output


def max_pool3d_with_taps(
    problem: Problem, input: torch.Tensor, memory_format: torch.memory_format
) -> tuple[torch.Tensor, torch.Tensor]:
    output = _outputs(problem, input.dtype, input.device, memory_format)
    taps = _outputs(problem, _taps_dtype(problem), input.device, memory_format)
    _max_pool3d(problem, input, output, taps, WITH_TAPS=True)
    return output, taps


def _max_pool3d(
    problem: Problem, input: torch.Tensor, output: torch.Tensor, taps: torch.Tensor, WITH_TAPS: bool
) -> None:
    check_kernel_dtype("max_pool3d", input.dtype)
    chosen = plan(problem, input.stride(1) == 1, input.itemsize)
    options = {"WITH_TAPS": WITH_TAPS, "UNROLL": chosen.unroll_window}
    _run(kernels.max_pool3d_kernel, problem, chosen.tile, (input, output, taps), output, _maximum(problem) | options)


def max_pool3d_indices(problem: Problem, taps: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    _check_taps(problem, taps)
    indices = _outputs(problem, torch.int64, taps.device, memory_format)
    tile = plan(problem, taps.stride(1) == 1, indices.itemsize).tile
    _run(kernels.max_pool3d_indices_kernel, problem, tile, (taps, indices), indices, _maximum(problem))
    return indices


def max_pool3d_backward(
    problem: Problem, grad: torch.Tensor, taps: torch.Tensor, memory_format: torch.memory_format
) -> torch.Tensor:
    check_kernel_dtype("max_pool3d_backward", grad.dtype)
    _check_taps(problem, taps)
    grad_input = _inputs(problem, grad, memory_format)
    if grad.numel() == 0:
        return grad_input.zero_()
    chosen = plan(problem, grad_input.stride(1) == 1, grad.itemsize)
    options = _maximum(problem) | {"OWNERS": chosen.owners, "UNROLL": chosen.unroll_owners}
    tensors = grad, taps, grad_input
    _run(kernels.max_pool3d_backward_kernel, problem, chosen.tile, tensors, grad_input, options)
    return grad_input


def max_pool3d_gather(
    problem: Problem, image: torch.Tensor, taps: torch.Tensor, memory_format: torch.memory_format
) -> torch.Tensor:
    check_kernel_dtype("max_pool3d_gather", image.dtype)
    _check_taps(problem, taps)
    output = _outputs(problem, image.dtype, image.device, memory_format)
    tile = plan(problem, taps.stride(1) == 1, image.itemsize).tile
    _run(kernels.max_pool3d_gather_kernel, problem, tile, (image, taps, output), output, _maximum(problem))
    return output


def avg_pool3d(problem: Problem, input: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    check_kernel_dtype("avg_pool3d", input.dtype)
    if isinstance(problem, AdaptivePool) and problem.result == (1, 1, 1) and _planes_join(input):
        # The mean of everything: that of an image whose rows are those of all planes, by the kernel for such windows.
        rows = input.flatten(2, 3)
        layout = as_memory_format(memory_format is torch.channels_last_3d)
        return images.avg_pool2d(adaptive_problem(rows.shape, (1, 1)), rows, layout).unsqueeze(2)
    output = _outputs(problem, input.dtype, input.device, memory_format)
    chosen = plan(problem, input.stride(1) == 1, input.itemsize)
    options = _average(problem) | {"DIVISOR": chosen.divisor, "UNROLL": chosen.unroll_window}
    _run(kernels.avg_pool3d_kernel, problem, chosen.tile, (input, output), output, options)
    return output


def _planes_join(input: torch.Tensor) -> bool:
    _, _, D, H, _ = input.shape
    return D == 1 or H == 1 or input.stride(2) == H * input.stride(3)


def avg_pool3d_backward(problem: Problem, grad: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    check_kernel_dtype("avg_pool3d_backward", grad.dtype)
    grad_input = _inputs(problem, grad, memory_format)
    if grad.numel() == 0:
        return grad_input.zero_()
    chosen = plan(problem, grad_input.stride(1) == 1, grad.itemsize)
    options = {"DIVISOR": chosen.divisor, "OWNERS": chosen.owners, "UNROLL": chosen.unroll_owners}
    tensors = grad, grad_input
    _run(kernels.avg_pool3d_backward_kernel, problem, chosen.tile, tensors, grad_input, _average(problem) | options)
    return grad_input


def _run(
    kernel: Any,
    problem: Problem,
    tile: Tile,
    tensors: tuple[torch.Tensor, ...],
    tiled: torch.Tensor,
    options: dict[str, Any],
) -> None:
    """Run ``kernel`` over all of ``tiled``, which is cut into tiles."""
    if tiled.numel() == 0:
        return
    layouts = tuple([(tensor.shape, tensor.stride()) for tensor in tensors])
    strides, constants = _prepared(kernel.__name__, problem, tile, layouts, tuple(options.items()))
    N, _, D, H, W = tiled.shape
    voxels = N * D * H * W
    volumes = [Volume(tensor, *each) for tensor, each in zip(tensors, strides, strict=True)]
    grid = cdiv(voxels, tile.pixels), cdiv(problem.C, tile.channels)
    sizes = kernels.Sizes(problem.C, *problem.image, *problem.result)
    launch(kernel, grid, tiled.device, (*volumes, voxels, sizes), constants)


@functools.lru_cache(maxsize=4096)
def _prepared(
    kernel: str,
    problem: Problem,
    tile: Tile,
    layouts: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...],
    options: tuple[tuple[str, Any], ...],
) -> tuple[tuple[tuple[int, ...], ...], CompileTime]:
    """Prepare a launch, once, as :mod:`gpukern.ops._pool2d.launch` does."""
    largest = max(reach(*layout) for layout in layouts)
    if isinstance(problem, AdaptivePool):
        # Adaptive windows begin at z·D/Z, and the product comes first.
        sizes = zip(problem.image, problem.result, strict=True)
        largest = max(largest, *((size + 1) * (outputs + 1) for size, outputs in sizes))
    constants = {
        "BLOCK_CHANNELS": tile.channels,
        "BLOCK_PIXELS": tile.pixels,
        "INDEX": index_type(largest),
        "num_warps": tile.warps,
    }
    return tuple(strides_of(*layout) for layout in layouts), compile_time(
        getattr(kernels, kernel), constants | dict(options)
    )


def _maximum(problem: Problem) -> dict[str, Any]:
    dilation = problem.dilation if isinstance(problem, VolumePool) else (1, 1, 1)
    return _windows(problem) | {"DILATION": dilation}


def _average(problem: Problem) -> dict[str, Any]:
    return _windows(problem) | {"INCLUDE_PAD": isinstance(problem, VolumePool) and problem.count_include_pad}


def _windows(problem: Problem) -> dict[str, Any]:
    stride = padding = (1, 1, 1)  # unused where windows are adaptive
    if isinstance(problem, VolumePool):
        stride, padding = problem.stride, problem.padding
    adaptive = isinstance(problem, AdaptivePool)
    return {"WINDOW": windows(problem)[0], "STRIDE": stride, "PADDING": padding, "ADAPTIVE": adaptive}


def _outputs(
    problem: Problem, dtype: torch.dtype, device: torch.device, memory_format: torch.memory_format
) -> torch.Tensor:
    """Allocate an uninitialised [N, C, Z, P, Q]."""
    shape = (problem.N, problem.C, *problem.result)
    return torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)


def _inputs(problem: Problem, like: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """Allocate an uninitialised [N, C, D, H, W]."""
    shape = (problem.N, problem.C, *problem.image)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _taps_dtype(problem: Problem) -> torch.dtype:
    return taps_dtype(problem.kernel if isinstance(problem, VolumePool) else ())


def _check_taps(problem: Problem, taps: torch.Tensor) -> None:
    if taps.dtype is not _taps_dtype(problem):
        raise RuntimeError(
            f"taps of {taps.dtype} do not come from gpukern's kernels: was the forward run in another mode?"
        )
