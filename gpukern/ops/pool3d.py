"""3-D pooling: maximum and average, over fixed windows and adaptive ones, differentiable to any order.

As :mod:`gpukern.ops.pool2d`. Fixed and adaptive windows share operators: ``output_size`` is empty for fixed ones, the
kernel's geometry for adaptive ones.
"""

from __future__ import annotations

from typing import Any

import torch

from gpukern.ops._pool2d.problem import check_adaptive, output_sizes
from gpukern.ops._pool3d.problem import AdaptivePool, Triple, VolumePool, adaptive_pool, volume_pool
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import Operator
from gpukern.runtime.strides import is_channels_last
from gpukern.runtime.tensors import as_memory_format, memory_format_of
from gpukern.runtime.transforms import Batch, linear_jvp

_implementations = Implementations("gpukern.ops._pool3d")

_aten = torch.ops.aten
_GEOMETRY = "SymInt[] output_size, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode"

#: (output_size, kernel, stride, padding, dilation, ceil_mode)
Windows = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]


def fixed(kernel: Triple, stride: Triple, padding: Triple, dilation: Triple, ceil_mode: bool) -> Windows:
    return (), kernel, stride, padding, dilation, ceil_mode


def adaptive(output_size: Triple) -> Windows:
    return output_size, (), (), (), (), False


def _problem(input_shape, output_size, *window) -> VolumePool | AdaptivePool:
    return adaptive_pool(input_shape, output_size) if output_size else volume_pool(input_shape, *window)


def _output_shape(input: torch.Tensor, output_size, *window) -> tuple[int, ...]:
    """Works on a tracer's symbolic sizes too."""
    if output_size:
        check_adaptive(input.shape, output_size)
    else:
        output_size = output_sizes(input.shape, *window[:5])
    return *input.shape[:2], *output_size


def _empty(like: torch.Tensor, shape, memory_format: torch.memory_format, dtype: torch.dtype | None = None):
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format)


def _is_last(tensor: torch.Tensor) -> bool:
    return is_channels_last(tensor.shape, tensor.stride())


def _gradient_layout(channels_last: bool) -> torch.memory_format:
    return as_memory_format(channels_last, 5)


# ---- maximum -------------------------------------------------------------------------------------------------------


def max_pool(
    input: torch.Tensor, windows: Windows, return_indices: bool
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The maximum of each window and, if requested, torch's indices. Taps are kept only if they are needed."""
    if not return_indices and not (input.requires_grad and torch.is_grad_enabled()):
        return max_pool3d(input, *windows)
    output, taps = max_pool3d_with_taps(input, *windows)
    if not return_indices:
        return output
    return output, max_pool3d_indices(taps, input.shape, *windows)


def _maximum_layout(input: torch.Tensor, output_size) -> torch.memory_format:
    """That of torch's results: adaptive ones are NCDHW."""
    return torch.contiguous_format if output_size else memory_format_of(input)


def _max_pool3d(input: torch.Tensor, *windows) -> torch.Tensor:
    problem = _problem(input.shape, *windows)
    return _implementations.of(input).max_pool3d(problem, input, _maximum_layout(input, windows[0]))


def _max_pool3d_fake(input, *windows) -> torch.Tensor:
    return _empty(input, _output_shape(input, *windows), _maximum_layout(input, windows[0]))


def _max_pool3d_save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    input, *ctx.geometry = arguments
    ctx.save_for_backward(input)


def _max_pool3d_backward(ctx: Any, grad: torch.Tensor) -> tuple:
    # Reached only by a graph captured for inference, whose forward kept no taps: find them again.
    (input,) = ctx.saved_tensors
    _, taps = max_pool3d_with_taps(input.detach(), *ctx.geometry)
    grad_input = max_pool3d_backward(grad, taps, input.shape, _is_last(input), *ctx.geometry)
    return grad_input, *(None,) * 6


def _max_pool3d_jvp(operator: Operator, arguments: tuple, tangents: tuple, output: torch.Tensor) -> torch.Tensor:
    return max_pool3d_gather(tangents[0], max_pool3d_with_taps(*arguments)[1], *arguments[1:])


def _max_pool3d_in_torch(input, output_size, *window) -> torch.Tensor:
    if output_size:
        return _aten.adaptive_max_pool3d.default(input, output_size)[0]
    return _aten.max_pool3d.default(input, *window)


#: For inference: the maximum alone.
max_pool3d = Operator(
    "max_pool3d",
    f"(Tensor input, {_GEOMETRY}) -> Tensor",
    forward=_max_pool3d,
    fake=_max_pool3d_fake,
    save=_max_pool3d_save,
    backward=_max_pool3d_backward,
    jvp=_max_pool3d_jvp,
    batch=Batch(images=(0,)),
    decomposition=_max_pool3d_in_torch,
)


def _with_taps(input: torch.Tensor, *windows) -> tuple[torch.Tensor, torch.Tensor]:
    problem = _problem(input.shape, *windows)
    return _implementations.of(input).max_pool3d_with_taps(problem, input, _maximum_layout(input, windows[0]))


def _with_taps_fake(input, *windows) -> tuple[torch.Tensor, torch.Tensor]:
    output = _max_pool3d_fake(input, *windows)
    return output, torch.empty_like(output, dtype=_implementations.of(input).taps_dtype(tuple(windows[1])))


def _with_taps_save(ctx: Any, arguments: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    input, *ctx.geometry = arguments
    ctx.save_for_backward(output[1])
    ctx.shape, ctx.channels_last = input.shape, _is_last(input)
    ctx.set_materialize_grads(False)  # else every backward allocates zeros for the taps


def _with_taps_backward(ctx: Any, grad: torch.Tensor | None, _: None) -> tuple:
    if grad is None:
        return (None,) * 7
    (taps,) = ctx.saved_tensors
    return max_pool3d_backward(grad, taps, ctx.shape, ctx.channels_last, *ctx.geometry), *(None,) * 6


def _with_taps_jvp(operator: Operator, arguments: tuple, tangents: tuple, output: tuple) -> tuple:
    return max_pool3d_gather(tangents[0], output[1], *arguments[1:]), None


def _with_indices_in_torch(input, output_size, *window) -> tuple[torch.Tensor, torch.Tensor]:
    if output_size:
        return _aten.adaptive_max_pool3d.default(input, output_size)
    return _aten.max_pool3d_with_indices.default(input, *window)


#: The maximum and its taps, in the form that the mode's own kernels read.
max_pool3d_with_taps = Operator(
    "max_pool3d_with_taps",
    f"(Tensor input, {_GEOMETRY}) -> (Tensor, Tensor)",
    forward=_with_taps,
    fake=_with_taps_fake,
    save=_with_taps_save,
    backward=_with_taps_backward,
    jvp=_with_taps_jvp,
    batch=Batch(images=(0,)),
    decomposition=_with_indices_in_torch,
)


def _indices(taps: torch.Tensor, input_shape, *windows) -> torch.Tensor:
    problem = _problem(input_shape, *windows)
    return _implementations.of(taps).max_pool3d_indices(problem, taps, memory_format_of(taps))


def _indices_fake(taps, input_shape, *windows) -> torch.Tensor:
    return _empty(taps, taps.shape, memory_format_of(taps), torch.int64)


def _indices_in_torch(taps, *_) -> torch.Tensor:
    """Return the indices of :func:`_with_indices_in_torch` unchanged: they are torch's already."""
    return _aten.clone.default(taps)


#: torch's flat indices (d·H + h)·W + w of the maxima, from their taps.
max_pool3d_indices = Operator(
    "max_pool3d_indices",
    f"(Tensor taps, SymInt[] input_shape, {_GEOMETRY}) -> Tensor",
    forward=_indices,
    fake=_indices_fake,
    batch=Batch(images=(0,), sizes=1),
    decomposition=_indices_in_torch,
)


def _scatter(grad: torch.Tensor, taps: torch.Tensor, input_shape, channels_last: bool, *windows) -> torch.Tensor:
    problem = _problem(input_shape, *windows)
    return _implementations.of(grad).max_pool3d_backward(problem, grad, taps, _gradient_layout(channels_last))


def _scatter_fake(grad, taps, input_shape, channels_last, *windows) -> torch.Tensor:
    return _empty(grad, input_shape, _gradient_layout(channels_last))


def _scatter_save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    _, taps, _, _, *ctx.geometry = arguments
    ctx.save_for_backward(taps)


def _scatter_backward(ctx: Any, grad_grad: torch.Tensor) -> tuple:
    (taps,) = ctx.saved_tensors
    return max_pool3d_gather(grad_grad, taps, *ctx.geometry), *(None,) * 9


max_pool3d_backward = Operator(
    "max_pool3d_backward",
    f"(Tensor grad, Tensor taps, SymInt[] input_shape, bool channels_last, {_GEOMETRY}) -> Tensor",
    forward=_scatter,
    fake=_scatter_fake,
    save=_scatter_save,
    backward=_scatter_backward,
    jvp=linear_jvp,
    batch=Batch(images=(0, 1), sizes=2),
)


def _gather(image: torch.Tensor, taps: torch.Tensor, *windows) -> torch.Tensor:
    problem = _problem(image.shape, *windows)
    return _implementations.of(image).max_pool3d_gather(problem, image, taps, memory_format_of(taps))


def _gather_fake(image, taps, *windows) -> torch.Tensor:
    return _empty(image, taps.shape, memory_format_of(taps))


def _gather_save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    image, taps, *ctx.geometry = arguments
    ctx.save_for_backward(taps)
    ctx.shape, ctx.channels_last = image.shape, _is_last(image)


def _gather_backward(ctx: Any, grad: torch.Tensor) -> tuple:
    (taps,) = ctx.saved_tensors
    return max_pool3d_backward(grad, taps, ctx.shape, ctx.channels_last, *ctx.geometry), *(None,) * 7


#: The values of another volume at the maxima's positions: the backward of :data:`max_pool3d_backward`.
max_pool3d_gather = Operator(
    "max_pool3d_gather",
    f"(Tensor image, Tensor taps, {_GEOMETRY}) -> Tensor",
    forward=_gather,
    fake=_gather_fake,
    save=_gather_save,
    backward=_gather_backward,
    jvp=linear_jvp,
    batch=Batch(images=(0, 1)),
)


# ---- average -------------------------------------------------------------------------------------------------------

_AVERAGE = f"{_GEOMETRY}, bool count_include_pad, int? divisor_override"


def _average_layout(input: torch.Tensor, output_size) -> torch.memory_format:
    """That of torch's results: NCDHW, but for the mean of everything."""
    return memory_format_of(input) if tuple(output_size) == (1, 1, 1) else torch.contiguous_format


def _avg_pool3d(input: torch.Tensor, *windows) -> torch.Tensor:
    problem = _problem(input.shape, *windows)
    return _implementations.of(input).avg_pool3d(problem, input, _average_layout(input, windows[0]))


def _avg_pool3d_fake(input, *windows) -> torch.Tensor:
    return _empty(input, _output_shape(input, *windows), _average_layout(input, windows[0]))


def _avg_pool3d_save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    input, *ctx.geometry = arguments
    ctx.shape, ctx.channels_last = input.shape, _is_last(input)


def _avg_pool3d_backward(ctx: Any, grad: torch.Tensor) -> tuple:
    return avg_pool3d_backward(grad, ctx.shape, ctx.channels_last, *ctx.geometry), *(None,) * 8


def _avg_pool3d_in_torch(input, output_size, kernel, stride, padding, dilation, *others) -> torch.Tensor:
    if output_size:
        return _aten.adaptive_avg_pool3d.default(input, output_size)
    return _aten.avg_pool3d.default(input, kernel, stride, padding, *others)


#: ``dilation`` is always (1, 1, 1): averages share the geometry of the maximum.
avg_pool3d = Operator(
    "avg_pool3d",
    f"(Tensor input, {_AVERAGE}) -> Tensor",
    forward=_avg_pool3d,
    fake=_avg_pool3d_fake,
    save=_avg_pool3d_save,
    backward=_avg_pool3d_backward,
    jvp=linear_jvp,
    batch=Batch(images=(0,)),
    decomposition=_avg_pool3d_in_torch,
)


def _avg_grad(grad: torch.Tensor, input_shape, channels_last: bool, *windows) -> torch.Tensor:
    problem = _problem(input_shape, *windows)
    return _implementations.of(grad).avg_pool3d_backward(problem, grad, _gradient_layout(channels_last))


def _avg_grad_fake(grad, input_shape, channels_last, *windows) -> torch.Tensor:
    return _empty(grad, input_shape, _gradient_layout(channels_last))


def _avg_grad_save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    _, _, _, *ctx.geometry = arguments


def _avg_grad_backward(ctx: Any, grad_grad: torch.Tensor) -> tuple:
    return avg_pool3d(grad_grad, *ctx.geometry), *(None,) * 10


avg_pool3d_backward = Operator(
    "avg_pool3d_backward",
    f"(Tensor grad, SymInt[] input_shape, bool channels_last, {_AVERAGE}) -> Tensor",
    forward=_avg_grad,
    fake=_avg_grad_fake,
    save=_avg_grad_save,
    backward=_avg_grad_backward,
    jvp=linear_jvp,
    batch=Batch(images=(0,), sizes=1),
)
