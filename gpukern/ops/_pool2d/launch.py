"""Launches of the pooling kernels, in functions of the same names and signatures as ``reference.py``."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from gpukern.ops._images import Image, image, strides_of
from gpukern.ops._pool2d import kernels
from gpukern.ops._pool2d.planner import Tile, plan
from gpukern.ops._pool2d.problem import AdaptiveProblem, Pair, PoolProblem
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.eight_bits import check_float8, in_8_bits, inverse
from gpukern.runtime.integers import cdiv
from gpukern.runtime.launcher import CompileTime, compile_time, index_type, launch
from gpukern.runtime.strides import reach
from gpukern.runtime.tensors import check_kernel_dtype


class Scales(NamedTuple):
    """The scale of an 8-bit input, and the inverse of an 8-bit output's."""

    input: float
    inverse_output: float


def taps_dtype(kernel: Pair) -> torch.dtype:
    """Return the dtype of a tap r·S + s: a byte for windows of up to 256 elements."""
    return torch.uint8 if kernel[0] * kernel[1] <= 256 else torch.int32


def max_pool2d(problem: PoolProblem, input: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    output = _outputs(problem, input.dtype, input.device, memory_format)
    if in_8_bits(input.dtype):
        _max_pool2d_quantized(problem, input, output)
    else:
        _max_pool2d(problem, input, output, output, WITH_TAPS=False)
    return output


def max_pool2d_with_taps(
    problem: PoolProblem, input: torch.Tensor, memory_format: torch.memory_format
) -> tuple[torch.Tensor, torch.Tensor]:
    output = _outputs(problem, input.dtype, input.device, memory_format)
    taps = _outputs(problem, taps_dtype(problem.kernel), input.device, memory_format)
    _max_pool2d(problem, input, output, taps, WITH_TAPS=True)
    return output, taps


def _max_pool2d(
    problem: PoolProblem, input: torch.Tensor, output: torch.Tensor, taps: torch.Tensor, WITH_TAPS: bool
) -> None:
    check_kernel_dtype("max_pool2d", input.dtype)
    chosen = plan(problem, input.stride(1) == 1, input.itemsize)
    _run(
        kernels.max_pool2d_kernel,
        problem,
        chosen.tile,
        (input, output, taps),
        (problem.C, problem.H, problem.W, problem.P, problem.Q),
        output,
        WITH_TAPS=WITH_TAPS,
        UNROLL=chosen.unroll_window,
        **_geometry(problem),
    )


def _max_pool2d_quantized(problem: PoolProblem, input: torch.Tensor, output: torch.Tensor) -> None:
    check_float8(input.dtype, device_spec(input.device))
    chosen = plan(problem, input.stride(1) == 1, input.itemsize)
    _run(
        kernels.max_pool2d_quantized_kernel,
        problem,
        chosen.tile,
        (input, output),
        (problem.C, problem.H, problem.W, problem.P, problem.Q),
        output,
        UNROLL=chosen.unroll_window,
        **_geometry(problem),
    )


def max_pool2d_indices(problem: PoolProblem, taps: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    _check_taps(problem, taps)
    indices = _outputs(problem, torch.int64, taps.device, memory_format)
    _run(
        kernels.max_pool2d_indices_kernel,
        problem,
        plan(problem, taps.stride(1) == 1, indices.itemsize).tile,
        (taps, indices),
        (problem.C, problem.W, problem.P, problem.Q),
        indices,
        **_geometry(problem),
    )
    return indices


def max_pool2d_backward(
    problem: PoolProblem, grad: torch.Tensor, taps: torch.Tensor, memory_format: torch.memory_format
) -> torch.Tensor:
    check_kernel_dtype("max_pool2d_backward", grad.dtype)
    _check_taps(problem, taps)
    grad_input = _inputs(problem, grad, memory_format)
    chosen = plan(problem, grad_input.stride(1) == 1, grad.itemsize)
    _run(
        kernels.max_pool2d_backward_kernel,
        problem,
        chosen.tile,
        (grad, taps, grad_input),
        (problem.C, problem.H, problem.W, problem.P, problem.Q),
        grad_input,
        OWNERS=chosen.owners,
        UNROLL=chosen.unroll_owners,
        **_geometry(problem),
    )
    return grad_input


def max_pool2d_gather(
    problem: PoolProblem, image: torch.Tensor, taps: torch.Tensor, memory_format: torch.memory_format
) -> torch.Tensor:
    check_kernel_dtype("max_pool2d_gather", image.dtype)
    _check_taps(problem, taps)
    output = _outputs(problem, image.dtype, image.device, memory_format)
    _run(
        kernels.max_pool2d_gather_kernel,
        problem,
        plan(problem, taps.stride(1) == 1, image.itemsize).tile,
        (image, taps, output),
        (problem.C, problem.H, problem.W, problem.P, problem.Q),
        output,
        **_geometry(problem),
    )
    return output


def avg_pool2d(
    problem: PoolProblem | AdaptiveProblem, input: torch.Tensor, memory_format: torch.memory_format
) -> torch.Tensor:
    check_kernel_dtype("avg_pool2d", input.dtype)
    output = _outputs(problem, input.dtype, input.device, memory_format)
    _avg_pool2d(problem, input, output, None)
    return output


def avg_pool2d_quantized(
    problem: PoolProblem | AdaptiveProblem,
    input: torch.Tensor,
    memory_format: torch.memory_format,
    input_scale: float,
    output_scale: float,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    for dtype in (input.dtype, output_dtype):
        check_float8(dtype, device_spec(input.device))
    output = _outputs(problem, output_dtype, input.device, memory_format)
    _avg_pool2d(problem, input, output, Scales(input_scale, inverse(output_scale)))
    return output


def _avg_pool2d(
    problem: PoolProblem | AdaptiveProblem, input: torch.Tensor, output: torch.Tensor, scales: Scales | None
) -> None:
    chosen = plan(problem, input.stride(1) == 1, input.itemsize)
    sizes = (problem.C, problem.H, problem.W, problem.P, problem.Q, scales)
    average = _average(problem)
    if chosen.whole_window is None:
        _run(
            kernels.avg_pool2d_kernel,
            problem,
            chosen.tile,
            (input, output),
            sizes,
            output,
            DIVISOR=chosen.divisor,
            WINDOW=chosen.window,
            UNROLL=chosen.unroll_window,
            **average,
        )
    else:
        _run_whole_windows(problem, chosen.whole_window, input, output, sizes, DIVISOR=chosen.divisor, **average)


def avg_pool2d_backward(
    problem: PoolProblem | AdaptiveProblem, grad: torch.Tensor, memory_format: torch.memory_format
) -> torch.Tensor:
    check_kernel_dtype("avg_pool2d_backward", grad.dtype)
    grad_input = _inputs(problem, grad, memory_format)
    if grad.numel() == 0:
        return grad_input.zero_()
    chosen = plan(problem, grad_input.stride(1) == 1, grad.itemsize)
    _run(
        kernels.avg_pool2d_backward_kernel,
        problem,
        chosen.tile,
        (grad, grad_input),
        (problem.C, problem.H, problem.W, problem.P, problem.Q),
        grad_input,
        DIVISOR=chosen.divisor,
        OWNERS=chosen.owners,
        UNROLL=chosen.unroll_owners,
        **_average(problem),
    )
    return grad_input


def _run(
    kernel: Any,
    problem: PoolProblem | AdaptiveProblem,
    tile: Tile,
    tensors: tuple[torch.Tensor, ...],
    sizes: tuple[Any, ...],
    tiled: torch.Tensor,
    **options: Any,
) -> None:
    """Run ``kernel`` over all of ``tiled``, which is cut into tiles."""
    if tiled.numel() == 0:
        return
    layouts = tuple([(tensor.shape, tensor.stride()) for tensor in tensors])
    strides, constants = _prepared(kernel.__name__, problem, tile, layouts, tuple(options.items()))
    N, _, H, W = tiled.shape
    pixels = N * H * W
    images = [Image(tensor, *each) for tensor, each in zip(tensors, strides, strict=True)]
    grid = cdiv(pixels, tile.pixels), cdiv(problem.C, tile.channels)
    launch(kernel, grid, tiled.device, (*images, pixels, *sizes), constants)


def _run_whole_windows(problem, tile, input, output, sizes, **options) -> None:
    if output.numel() == 0:
        return
    layouts = (input.shape, input.stride()), (output.shape, output.stride())
    kernel = kernels.avg_pool2d_whole_window_kernel
    _, constants = _prepared(kernel.__name__, problem, tile, layouts, tuple(options.items()))
    grid = problem.N * problem.P * problem.Q, cdiv(problem.C, tile.channels)
    launch(kernel, grid, output.device, (image(input), image(output), *sizes), constants)


@functools.lru_cache(maxsize=4096)
def _prepared(
    kernel: str,
    problem: PoolProblem | AdaptiveProblem,
    tile: Tile,
    layouts: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...],
    options: tuple[tuple[str, Any], ...],
) -> tuple[tuple[tuple[int, ...], ...], CompileTime]:
    """Prepare a launch from the tensors' shapes and strides, once: the strides of images, and all constants.

    The kernel is passed by its name: Triton's functions take long to hash.
    """
    largest = max(reach(*layout) for layout in layouts)
    if isinstance(problem, AdaptiveProblem):
        # Adaptive windows begin at p·H/P, and the product comes first.
        largest = max(largest, (problem.P + 1) * (problem.H + 1), (problem.Q + 1) * (problem.W + 1))
    constants = {
        "BLOCK_CHANNELS": tile.channels,
        "BLOCK_PIXELS": tile.pixels,
        "INDEX": index_type(largest),
        "num_warps": tile.warps,
    }
    return tuple(strides_of(*layout) for layout in layouts), compile_time(
        getattr(kernels, kernel), constants | dict(options)
    )


def _geometry(problem: PoolProblem) -> dict[str, Pair]:
    return {
        "KERNEL": problem.kernel,
        "STRIDE": problem.stride,
        "PADDING": problem.padding,
        "DILATION": problem.dilation,
    }


def _average(problem: PoolProblem | AdaptiveProblem) -> dict[str, Any]:
    if isinstance(problem, AdaptiveProblem):
        unused = (1, 1)
        return {"KERNEL": unused, "STRIDE": unused, "PADDING": unused, "ADAPTIVE": True, "INCLUDE_PAD": False}
    return {
        "KERNEL": problem.kernel,
        "STRIDE": problem.stride,
        "PADDING": problem.padding,
        "ADAPTIVE": False,
        "INCLUDE_PAD": problem.count_include_pad,
    }


def _outputs(problem, dtype: torch.dtype, device: torch.device, memory_format: torch.memory_format) -> torch.Tensor:
    """Allocate an uninitialised [N, C, P, Q]."""
    shape = (problem.N, problem.C, problem.P, problem.Q)
    return torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)


def _inputs(problem, like: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """Allocate an uninitialised [N, C, H, W]."""
    shape = (problem.N, problem.C, problem.H, problem.W)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _check_taps(problem: PoolProblem, taps: torch.Tensor) -> None:
    if taps.dtype is not taps_dtype(problem.kernel):
        raise RuntimeError(
            f"taps of {taps.dtype} do not come from gpukern's kernels: was the forward run in another mode?"
        )
