"""The convolutions, fully-connected layers and pools of a network, recorded from a run on a meta tensor."""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gpukern.conv import ConvProblem, conv_problem
from gpukern.ops._pool2d.problem import AdaptiveProblem, PoolProblem, adaptive_problem, pool_problem


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer that has no layers inside: its name, and the shape it was given.

    ``is_first``: it takes the network's own input, whose gradient is not needed.
    """

    name: str
    module: torch.nn.Module
    input_shape: tuple[int, ...]
    is_first: bool = False


@dataclass(frozen=True)
class Linear:
    """[rows, inputs] → [rows, outputs]."""

    rows: int
    inputs: int
    outputs: int


class Kind(enum.Enum):
    """The reduction of a pool's window; the values are its names in descriptions and in files of results."""

    MAX = "maximum"
    AVERAGE = "average"
    ADAPTIVE = "adaptive average"


@dataclass(frozen=True)
class Pool:
    """[N, C, H, W] → [N, C, P, Q]."""

    kind: Kind
    window: PoolProblem | AdaptiveProblem


Problem = ConvProblem | Linear | Pool


def layer_calls(model: torch.nn.Module, image: torch.Tensor) -> tuple[LayerCall, ...]:
    """The calls of ``model(image)`` in their order; both may be on the meta device."""
    calls: list[LayerCall] = []

    def record(name: str, module: torch.nn.Module, inputs: tuple, output: Any) -> None:
        if inputs and isinstance(inputs[0], torch.Tensor):
            calls.append(LayerCall(name, module, tuple(inputs[0].shape), inputs[0] is image))

    hooks = [
        module.register_forward_hook(functools.partial(record, name))
        for name, module in model.named_modules()
        if not any(module.children())
    ]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(calls)


def distinct(problems: Iterable[tuple[LayerCall, Any]]) -> Iterator[tuple[LayerCall, int, Any]]:
    """(the first call, how many there are, the problem) of each distinct problem that is not None."""
    found: dict[Any, list[LayerCall]] = {}
    for call, problem in problems:
        if problem is not None:
            found.setdefault(problem, []).append(call)
    for problem, calls in found.items():
        yield calls[0], len(calls), problem


def problem_of(call: LayerCall) -> Problem | None:
    """Return the problem that gpukern computes for a layer; None if there is none."""
    return conv_of(call) or linear_of(call) or pool_of(call)


def conv_of(call: LayerCall) -> ConvProblem | None:
    """The problem of a convolution with zero padding on both sides alike, else None."""
    layer = call.module
    if type(layer) is not torch.nn.Conv2d or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    vertical, horizontal = layer.padding
    padding = vertical, vertical, horizontal, horizontal
    return conv_problem(
        call.input_shape, tuple(layer.weight.shape), None, layer.stride, padding, layer.dilation, layer.groups
    )


def linear_of(call: LayerCall) -> Linear | None:
    """The problem of a fully-connected layer; dimensions before the last are rows."""
    if type(call.module) is not torch.nn.Linear:
        return None
    return Linear(math.prod(call.input_shape[:-1]), call.module.in_features, call.module.out_features)


def pool_of(call: LayerCall) -> Pool | None:
    """The problem of a maximum, an average or an adaptive average over images."""
    layer, shape = call.module, call.input_shape
    if type(layer) is torch.nn.MaxPool2d:
        window = _pairs(layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        return Pool(Kind.MAX, pool_problem(shape, *window, layer.ceil_mode))
    if type(layer) is torch.nn.AvgPool2d:
        window = _pairs(layer.kernel_size, layer.stride, layer.padding, 1)
        rest = layer.ceil_mode, layer.count_include_pad, layer.divisor_override
        return Pool(Kind.AVERAGE, pool_problem(shape, *window, *rest))
    if type(layer) is torch.nn.AdaptiveAvgPool2d:
        (size,) = _pairs(layer.output_size)
        return Pool(Kind.ADAPTIVE, adaptive_problem(shape, tuple(s or n for s, n in zip(size, shape[2:], strict=True))))
    return None


def _pairs(*values: Any) -> list[tuple[int, int]]:
    return [(value, value) if isinstance(value, int) else tuple(value) for value in values]


def describe_pool(pool: Pool) -> str:
    """The sizes as people write them, and what is not the default."""
    w = pool.window
    words = f"{pool.kind.value}, {w.N}×{w.C}×{w.H}×{w.W}"
    if isinstance(w, AdaptiveProblem):
        return f"{words} to {w.P}×{w.Q}"
    words += f", window {w.kernel[0]}×{w.kernel[1]}, stride {w.stride[0]}×{w.stride[1]}"
    if any(w.padding):
        words += f", padding {w.padding[0]}×{w.padding[1]}"
    if w.dilation != (1, 1):
        words += f", dilation {w.dilation[0]}×{w.dilation[1]}"
    words += ", rounded up" * w.ceil_mode
    if pool.kind is Kind.AVERAGE:
        words += ", padding not counted" * (not w.count_include_pad)
        words += f", divided by {w.divisor_override}" * (w.divisor_override is not None)
    return words
