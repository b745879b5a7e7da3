"""What steps have from the network: its tensors, activations in the epilogues of convolutions, and who computes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gpukern import functional as F
from gpukern.densify.values import Pair
from gpukern.ops._activation.reference import in_torch


@dataclass(frozen=True)
class Held:
    """A tensor that the model has under a dotted name. ``of_rows``: one that was combined with rows."""

    name: str
    of_rows: bool = False

    def of(self, network: torch.nn.Module) -> torch.Tensor:
        tensor = find(network, self.name)
        return tensor[..., None, None] if self.of_rows and tensor.dim() else tensor


def find(network: Any, name: str) -> Any:
    """Return what ``network`` has under a dotted name."""
    return functools.reduce(getattr, name.split("."), network)


class Activation:
    """What follows in a convolution's epilogue."""

    def epilogue(self, network: torch.nn.Module) -> dict[str, Any]:
        """The arguments of :func:`gpukern.functional.conv2d` for it."""
        raise NotImplementedError

    def in_torch(self, network: torch.nn.Module, input: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class FixedActivation(Activation):
    name: str
    slope: float = 0.01

    def epilogue(self, network: torch.nn.Module) -> dict[str, Any]:
        return {"activation": self.name, "negative_slope": self.slope}

    def in_torch(self, network: torch.nn.Module, input: torch.Tensor) -> torch.Tensor:
        return in_torch(input, self.name, self.slope)


@dataclass(frozen=True)
class LayerActivation(Activation):
    """That of a layer, whose arguments may change."""

    layer: str

    def epilogue(self, network: torch.nn.Module) -> dict[str, Any]:
        return find(network, self.layer)._epilogue

    def in_torch(self, network: torch.nn.Module, input: torch.Tensor) -> torch.Tensor:
        return find(network, self.layer)(input)


class Kernels:
    """gpukern's functions, as steps call them."""

    def conv2d(self, network, input, weight, bias, dilation: Pair, groups: int, activation: Activation | None):
        epilogue = {} if activation is None else activation.epilogue(network)
        return F.conv2d(input, weight, bias, 1, 0, dilation, groups, **epilogue)

    def layer(self, network, weight: Held, compute: Callable[[], Any]) -> Any:
        """What ``compute`` returns, in the name of the layer that has the ``weight``."""
        return compute()

    def max_pool2d(self, input, window: Pair, dilation: Pair):
        return F.max_pool2d(input, window, 1, 0, dilation)

    def function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function
