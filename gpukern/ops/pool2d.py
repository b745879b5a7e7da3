"""2-D pooling: maximum, average and adaptive average, differentiable to any order.

An average is linear, so its backward's backward is the average again. A maximum is linear too once the place of each
maximum, its *tap*, is known: its backward scatters along the taps, and the backward of that gathers along them.
"""

from __future__ import annotations

from typing import Any

import torch

from gpukern.ops._pool2d.problem import Pair, adaptive_problem, check_adaptive, output_size, pool_problem
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import Operator
from gpukern.runtime.tensors import as_memory_format, memory_format_of
from gpukern.runtime.transforms import Batch, linear_jvp

_implementations = Implementations("gpukern.ops._pool2d")

_aten = torch.ops.aten
_GEOMETRY = "int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode"

_BATCH = Batch(images=(0,))
#: The batch of operators that also take the shape of the pool's input.
_BATCH_OF_GRADIENTS = Batch(images=(0,), sizes=1)


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return memory_format_of(tensor) is torch.channels_last


def _empty(like: torch.Tensor, shape, memory_format: torch.memory_format, dtype: torch.dtype | None = None):
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format)


# ---- maximum -------------------------------------------------------------------------------------------------------


def max_pool(
    input: torch.Tensor,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
    return_indices: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The maximum of each window and, if requested, torch's indices. Taps are kept only if they are needed."""
    geometry = kernel, stride, padding, dilation, ceil_mode
    if not return_indices and not (input.requires_grad and torch.is_grad_enabled()):
        return max_pool2d(input, *geometry)
    output, taps = max_pool2d_with_taps(input, *geometry)
    if not return_indices:
        return output
    return output, max_pool2d_indices(taps, input.shape, *geometry)


def _max_pool2d(
    input: torch.Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> torch.Tensor:
    problem = pool_problem(input.shape, kernel, stride, padding, dilation, ceil_mode)
    return _implementations.of(input).max_pool2d(problem, input, memory_format_of(input))


def _max_pool2d_fake(input, *geometry) -> torch.Tensor:
    shape = (*input.shape[:2], *output_size(input.shape, *geometry))
    return _empty(input, shape, memory_format_of(input))


def _max_pool2d_save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    input, *ctx.geometry = arguments
    ctx.save_for_backward(input)


def _max_pool2d_backward(ctx: Any, grad: torch.Tensor) -> tuple:
    # Reached only by a graph captured for inference, whose forward kept no taps: find them again.
    (input,) = ctx.saved_tensors
    _, taps = max_pool2d_with_taps(input.detach(), *ctx.geometry)
    grad_input = max_pool2d_backward(grad, taps, input.shape, _is_channels_last(input), *ctx.geometry)
    return grad_input, *(None,) * 5


def _max_pool2d_jvp(operator: Operator, arguments: tuple, tangents: tuple, output: torch.Tensor) -> torch.Tensor:
    return max_pool2d_gather(tangents[0], max_pool2d_with_taps(*arguments)[1], *arguments[1:])


#: For inference: the maximum alone.
max_pool2d = Operator(
    "max_pool2d",
    f"(Tensor input, {_GEOMETRY}) -> Tensor",
    forward=_max_pool2d,
    fake=_max_pool2d_fake,
    save=_max_pool2d_save,
    backward=_max_pool2d_backward,
    jvp=_max_pool2d_jvp,
    batch=_BATCH,
    decomposition=_aten.max_pool2d.default,
)


def _with_taps(
    input: torch.Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    problem = pool_problem(input.shape, kernel, stride, padding, dilation, ceil_mode)
    return _implementations.of(input).max_pool2d_with_taps(problem, input, memory_format_of(input))


def _with_taps_fake(input, kernel, *geometry) -> tuple[torch.Tensor, torch.Tensor]:
    output = _max_pool2d_fake(input, kernel, *geometry)
    return output, torch.empty_like(output, dtype=_implementations.of(input).taps_dtype(tuple(kernel)))


def _with_taps_save(ctx: Any, arguments: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    input, *ctx.geometry = arguments
    ctx.save_for_backward(output[1])
    ctx.shape, ctx.channels_last = input.shape, _is_channels_last(input)
    ctx.set_materialize_grads(False)  # else every backward allocates zeros for the taps


def _with_taps_backward(ctx: Any, grad: torch.Tensor | None, _: None) -> tuple:
    if grad is None:
        return (None,) * 6
    (taps,) = ctx.saved_tensors
    return max_pool2d_backward(grad, taps, ctx.shape, ctx.channels_last, *ctx.geometry), *(None,) * 5


def _with_taps_jvp(operator: Operator, arguments: tuple, tangents: tuple, output: tuple) -> tuple:
    return max_pool2d_gather(tangents[0], output[1], *arguments[1:]), None


def _with_indices_in_torch(input, *geometry) -> tuple[torch.Tensor, torch.Tensor]:
    # In two operators: the indices are mostly for a backward that will not run.
    return _aten.max_pool2d.default(input, *geometry), _aten.max_pool2d_with_indices.default(input, *geometry)[1]


#: The maximum and its taps, in the form that the mode's own kernels read.
max_pool2d_with_taps = Operator(
    "max_pool2d_with_taps",
    f"(Tensor input, {_GEOMETRY}) -> (Tensor, Tensor)",
    forward=_with_taps,
    fake=_with_taps_fake,
    save=_with_taps_save,
    backward=_with_taps_backward,
    jvp=_with_taps_jvp,
    batch=_BATCH,
    decomposition=_with_indices_in_torch,
)


def _indices(taps: torch.Tensor, input_shape, *geometry) -> torch.Tensor:
    problem = pool_problem(input_shape, *geometry)
    return _implementations.of(taps).max_pool2d_indices(problem, taps, memory_format_of(taps))


def _indices_fake(taps, input_shape, *geometry) -> torch.Tensor:
    return _empty(taps, taps.shape, memory_format_of(taps), torch.int64)


def _indices_in_torch(taps, *_) -> torch.Tensor:
    """Return the indices of :func:`_with_indices_in_torch` unchanged: they are torch's already."""
    return _aten.clone.default(taps)


#: torch's flat indices h·W + w of the maxima, from their taps.
max_pool2d_indices = Operator(
    "max_pool2d_indices",
    f"(Tensor taps, SymInt[] input_shape, {_GEOMETRY}) -> Tensor",
    forward=_indices,
    fake=_indices_fake,
    batch=Batch(images=(0,), sizes=1),
    decomposition=_indices_in_torch,
)


def _scatter(grad: torch.Tensor, taps: torch.Tensor, input_shape, channels_last: bool, *geometry) -> torch.Tensor:
    problem = pool_problem(input_shape, *geometry)
    return _implementations.of(grad).max_pool2d_backward(problem, grad, taps, as_memory_format(channels_last))


def _scatter_fake(grad, taps, input_shape, channels_last, *geometry) -> torch.Tensor:
    return _empty(grad, input_shape, as_memory_format(channels_last))


def _scatter_save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    _, taps, ctx.shape, _, *ctx.geometry = arguments
    ctx.save_for_backward(taps)


def _scatter_backward(ctx: Any, grad_grad: torch.Tensor) -> tuple:
    (taps,) = ctx.saved_tensors
    return max_pool2d_gather(grad_grad, taps, *ctx.geometry), *(None,) * 8


max_pool2d_backward = Operator(
    "max_pool2d_backward",
    f"(Tensor grad, Tensor taps, SymInt[] input_shape, bool channels_last, {_GEOMETRY}) -> Tensor",
    forward=_scatter,
    fake=_scatter_fake,
    save=_scatter_save,
    backward=_scatter_backward,
    jvp=linear_jvp,
    batch=Batch(images=(0, 1), sizes=2),
)


def _gather(image: torch.Tensor, taps: torch.Tensor, *geometry) -> torch.Tensor:
    problem = pool_problem(image.shape, *geometry)
    return _implementations.of(image).max_pool2d_gather(problem, image, taps, memory_format_of(taps))


def _gather_fake(image, taps, *geometry) -> torch.Tensor:
    return _empty(image, taps.shape, memory_format_of(taps))


def _gather_save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    image, taps, *ctx.geometry = arguments
    ctx.save_for_backward(taps)
    ctx.shape, ctx.channels_last = image.shape, _is_channels_last(image)


def _gather_backward(ctx: Any, grad: torch.Tensor) -> tuple:
    (taps,) = ctx.saved_tensors
    return max_pool2d_backward(grad, taps, ctx.shape, ctx.channels_last, *ctx.geometry), *(None,) * 6


#: The values of another image at the maxima's positions: the backward of :data:`max_pool2d_backward`.
max_pool2d_gather = Operator(
    "max_pool2d_gather",
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


def _avg_pool2d(input: torch.Tensor, *geometry) -> torch.Tensor:
    problem = pool_problem(input.shape, *geometry)
    return _implementations.of(input).avg_pool2d(problem, input, memory_format_of(input))


def _avg_pool2d_fake(input, *geometry) -> torch.Tensor:
    return _max_pool2d_fake(input, *geometry[:5])


def _linear_save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    input, *ctx.geometry = arguments
    ctx.shape, ctx.channels_last = input.shape, _is_channels_last(input)


def _avg_pool2d_backward(ctx: Any, grad: torch.Tensor) -> tuple:
    return avg_pool2d_backward(grad, ctx.shape, ctx.channels_last, *ctx.geometry), *(None,) * 7


def _avg_pool2d_in_torch(input, kernel, stride, padding, dilation, *others) -> torch.Tensor:
    return _aten.avg_pool2d.default(input, kernel, stride, padding, *others)


#: ``dilation`` is always (1, 1): averages share the geometry of the maximum.
avg_pool2d = Operator(
    "avg_pool2d",
    f"(Tensor input, {_AVERAGE}) -> Tensor",
    forward=_avg_pool2d,
    fake=_avg_pool2d_fake,
    save=_linear_save,
    backward=_avg_pool2d_backward,
    jvp=linear_jvp,
    batch=_BATCH,
    decomposition=_avg_pool2d_in_torch,
)


def _avg_grad(grad: torch.Tensor, input_shape, channels_last: bool, *geometry) -> torch.Tensor:
    problem = pool_problem(input_shape, *geometry)
    return _implementations.of(grad).avg_pool2d_backward(problem, grad, as_memory_format(channels_last))


def _grad_fake(grad, input_shape, channels_last, *geometry) -> torch.Tensor:
    return _empty(grad, input_shape, as_memory_format(channels_last))


def _avg_grad_save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    _, _, _, *ctx.geometry = arguments


def _avg_grad_backward(ctx: Any, grad_grad: torch.Tensor) -> tuple:
    return avg_pool2d(grad_grad, *ctx.geometry), *(None,) * 9


avg_pool2d_backward = Operator(
    "avg_pool2d_backward",
    f"(Tensor grad, SymInt[] input_shape, bool channels_last, {_AVERAGE}) -> Tensor",
    forward=_avg_grad,
    fake=_grad_fake,
    save=_avg_grad_save,
    backward=_avg_grad_backward,
    jvp=linear_jvp,
    batch=_BATCH_OF_GRADIENTS,
)


# ---- adaptive average ----------------------------------------------------------------------------------------------


def _adaptive(input: torch.Tensor, output_size: Pair) -> torch.Tensor:
    problem = adaptive_problem(input.shape, output_size)
    return _implementations.of(input).avg_pool2d(problem, input, memory_format_of(input))


def _adaptive_fake(input, output_size) -> torch.Tensor:
    check_adaptive(input.shape, output_size)
    return _empty(input, (*input.shape[:2], *output_size), memory_format_of(input))


def _adaptive_backward(ctx: Any, grad: torch.Tensor) -> tuple:
    (output_size,) = ctx.geometry
    return adaptive_avg_pool2d_backward(grad, ctx.shape, ctx.channels_last, output_size), None


adaptive_avg_pool2d = Operator(
    "adaptive_avg_pool2d",
    "(Tensor input, SymInt[] output_size) -> Tensor",
    forward=_adaptive,
    fake=_adaptive_fake,
    save=_linear_save,
    backward=_adaptive_backward,
    jvp=linear_jvp,
    batch=_BATCH,
    decomposition=_aten.adaptive_avg_pool2d.default,
)


def _adaptive_grad(grad: torch.Tensor, input_shape, channels_last: bool, output_size: Pair) -> torch.Tensor:
    problem = adaptive_problem(input_shape, output_size)
    return _implementations.of(grad).avg_pool2d_backward(problem, grad, as_memory_format(channels_last))


def _adaptive_grad_backward(ctx: Any, grad_grad: torch.Tensor) -> tuple:
    (output_size,) = ctx.geometry
    return adaptive_avg_pool2d(grad_grad, output_size), None, None, None


adaptive_avg_pool2d_backward = Operator(
    "adaptive_avg_pool2d_backward",
    "(Tensor grad, SymInt[] input_shape, bool channels_last, SymInt[] output_size) -> Tensor",
    forward=_adaptive_grad,
    fake=_grad_fake,
    save=_avg_grad_save,
    backward=_adaptive_grad_backward,
    jvp=linear_jvp,
    batch=_BATCH_OF_GRADIENTS,
)
