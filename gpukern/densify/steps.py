"""What a dense network computes, one operation after the other: small values that hold no tensors.

Parameters are looked up by their names in the network when they are needed, so that they may be replaced in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from gpukern.densify.epilogues import Activation, Held, Kernels, find
from gpukern.densify.values import Pair, Value


class Operation:
    """A step's computation, by ``kernels``, with the tensors of ``network``."""

    def run(self, network: torch.nn.Module, kernels: Kernels, *values: Any) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class Convolve(Operation):
    """A convolution of stride 1. ``window``: the size of what a linear layer, whose weight this is, had flattened."""

    weight: Held
    bias: Held | None
    dilation: Pair
    groups: int = 1
    window: Pair | None = None
    activation: Activation | None = None

    def run(self, network: torch.nn.Module, kernels: Kernels, *values: Any) -> Any:
        (input,) = values
        weight = self.weight.of(network)
        if self.window is not None:
            weight = weight.unflatten(1, (-1, *self.window))
        bias = None if self.bias is None else self.bias.of(network)
        return kernels.conv2d(network, input, self.weight, weight, bias, self.dilation, self.groups, self.activation)


#: Windows with more elements are summed by rows first, then by columns.
_SUMMED_AT_ONCE = 49


@dataclass(frozen=True)
class Average(Operation):
    """The sum of a dilated window over ``divisor``: a depthwise convolution, because no average pool is dilated."""

    window: Pair
    divisor: int
    dilation: Pair

    def run(self, network: torch.nn.Module, kernels: Kernels, *values: Any) -> Any:
        (input,), (rows, columns) = values, self.window
        if rows * columns <= _SUMMED_AT_ONCE or 1 in self.window:
            return self._sum(network, kernels, input, self.window, 1 / self.divisor)
        of_rows = self._sum(network, kernels, input, (rows, 1), 1 / rows)
        return self._sum(network, kernels, of_rows, (1, columns), rows / self.divisor)

    def _sum(self, network: torch.nn.Module, kernels: Kernels, input: Any, window: Pair, factor: float) -> Any:
        channels = input.shape[1]
        weight = torch.full((channels, 1, *window), factor, dtype=input.dtype, device=input.device)
        return kernels.conv2d(network, input, None, weight, None, self.dilation, channels, None)


@dataclass(frozen=True)
class Maximum(Operation):
    """The maximum of a dilated window, at every pixel."""

    window: Pair
    dilation: Pair

    def run(self, network: torch.nn.Module, kernels: Kernels, *values: Any) -> Any:
        return kernels.max_pool2d(values[0], self.window, self.dilation)


@dataclass(frozen=True)
class Crop(Operation):
    """All but some rows (top, bottom) and columns (left, right)."""

    rows: Pair
    columns: Pair

    def run(self, network: torch.nn.Module, kernels: Kernels, *values: Any) -> Any:
        (top, bottom), (left, right) = self.rows, self.columns
        return values[0][:, :, top : -bottom or None, left : -right or None]


@dataclass(frozen=True)
class Channels(Operation):
    """Channels ``start``, ``start`` + ``step``, … before ``stop``, as in a slice."""

    start: int | None
    stop: int | None
    step: int | None

    def run(self, network: torch.nn.Module, kernels: Kernels, *values: Any) -> Any:
        return values[0][:, self.start : self.stop : self.step]


@dataclass(frozen=True)
class Layer(Operation):
    """A layer that treats all pixels alike, as it is.

    ``layout``: "images", as which most take them, or "channels_last" for those that look along the last dimension.
    """

    layer: str
    layout: str = "images"

    def run(self, network: torch.nn.Module, kernels: Kernels, *values: Any) -> Any:
        (input,), layer = values, find(network, self.layer)
        if self.layout == "channels_last":
            return layer(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return layer(input)


@dataclass(frozen=True)
class Operand:
    """Stands for a value among the arguments of a :class:`Call`."""

    place: int


@dataclass(frozen=True)
class Call(Operation):
    """A function of values, :class:`Held` tensors and constants that treats all pixels alike."""

    function: Callable[..., Any]
    arguments: tuple
    options: Mapping[str, Any] = field(default_factory=dict)
    #: The function as an epilogue, where it can be one.
    activation: Activation | None = None

    def run(self, network: torch.nn.Module, kernels: Kernels, *values: Any) -> Any:
        function = kernels.function(self.function)
        return function(*(_resolved(each, network, values) for each in self.arguments), **self.options)


def _resolved(argument: Any, network: torch.nn.Module, values: tuple) -> Any:
    if isinstance(argument, Operand):
        return values[argument.place]
    return argument.of(network) if isinstance(argument, Held) else argument


@dataclass(frozen=True)
class Concatenate(Operation):
    """Channels of several values, one after the other."""

    def run(self, network: torch.nn.Module, kernels: Kernels, *values: Any) -> Any:
        return torch.cat(values, 1)


@dataclass(frozen=True)
class Drop(Operation):
    """A functional dropout, in training, ``always`` or ``never``."""

    function: Callable[..., Any]
    p: float
    always: bool
    never: bool = False

    def run(self, network: torch.nn.Module, kernels: Kernels, *values: Any) -> Any:
        return kernels.function(self.function)(values[0], self.p, self.always or (network.training and not self.never))


@dataclass(frozen=True)
class Step:
    """An operation on the values in the slots ``inputs``, whose result goes into that of ``value``.

    ``name`` and ``kind`` are those of the layer, for the report; ``multiply_adds``: for each element of a channel, all
    channels together.
    """

    name: str
    kind: str
    operation: Operation
    inputs: tuple[int, ...]
    value: Value
    kernel: Pair | None = None
    dilation: Pair | None = None
    multiply_adds: int = 0
    #: Slots that nobody reads any more.
    last: tuple[int, ...] = ()
