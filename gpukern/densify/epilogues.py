"""What steps have from the network: its tensors, activations in the epilogues of convolutions, and who computes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils import parametrize

from gpukern import functional as F
from gpukern.convert import REPLACEMENTS
from gpukern.densify.values import Pair
from gpukern.nn.leaf import Leaf
from gpukern.ops._activation.reference import in_torch

_torch = torch.nn.functional


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

    def epilogue(self, network: torch.nn.Module) -> dict[str, Any] | None:
        """The arguments of :func:`gpukern.functional.conv2d` for it; None if it has none."""
        raise NotImplementedError

    def of(self, network: torch.nn.Module, input: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class FixedActivation(Activation):
    name: str
    slope: float = 0.01

    def epilogue(self, network: torch.nn.Module) -> dict[str, Any]:
        return {"activation": self.name, "negative_slope": self.slope}

    def of(self, network: torch.nn.Module, input: torch.Tensor) -> torch.Tensor:
        return in_torch(input, self.name, self.slope)


@dataclass(frozen=True)
class LayerActivation(Activation):
    """That of a layer, whose arguments may change."""

    layer: str

    def epilogue(self, network: torch.nn.Module) -> dict[str, Any] | None:
        return getattr(find(network, self.layer), "_epilogue", None)

    def of(self, network: torch.nn.Module, input: torch.Tensor) -> torch.Tensor:
        return find(network, self.layer)(input)


# ---- who computes ----------------------------------------------------------------------------------------------------


class Kernels:
    """gpukern's functions, as steps call them."""

    def conv2d(self, network, input, held: Held | None, weight, bias, dilation: Pair, groups: int, activation):
        """The convolution of stride 1 with ``weight``, that of ``held``, and an :class:`Activation` or None."""
        epilogue = {} if activation is None else activation.epilogue(network)
        if epilogue is None:
            return activation.of(network, self.conv2d(network, input, held, weight, bias, dilation, groups, None))
        return F.conv2d(input, weight, bias, 1, 0, dilation, groups, **epilogue)

    def max_pool2d(self, input, window: Pair, dilation: Pair):
        return F.max_pool2d(input, window, 1, 0, dilation)

    def function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function


class InTorch(Kernels):
    """torch's functions in their place, under the names of the layers that have the weights."""

    def conv2d(self, network, input, held: Held | None, weight, bias, dilation: Pair, groups: int, activation):
        def compute() -> torch.Tensor:
            return _torch.conv2d(input, weight, bias, 1, 0, dilation, groups)

        layer = None if held is None or "." not in held.name else find(network, held.name.rpartition(".")[0])
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)) and torch.compiler.is_exporting():
            with _forward(layer, compute):
                result = layer()
        else:
            result = compute()
        return result if activation is None else activation.of(network, result)

    def max_pool2d(self, input, window: Pair, dilation: Pair):
        return _torch.max_pool2d(input, window, 1, 0, dilation)

    def function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        ours = (getattr(function, "__module__", None) or "").startswith("gpukern.")  # methods of tensors have none
        return getattr(_torch, function.__name__) if ours else function


@contextlib.contextmanager
def _forward(layer: torch.nn.Module, compute: Callable[[], torch.Tensor]) -> Iterator[None]:
    """Let a call of ``layer`` compute something else: what is exported in it bears its name."""
    vars(layer)["forward"] = compute
    try:
        yield
    finally:
        del vars(layer)["forward"]


_OURS, _TORCHS = Kernels(), InTorch()
_LAYERS = {*REPLACEMENTS, *REPLACEMENTS.values()}


def kernels_of(network: torch.nn.Module) -> Kernels:
    """Whose functions compute a network: those of its layers, which :func:`gpukern.convert` changes.

    Convolutions and linear layers in float64 are torch's on any device, and so is every layer of a copy that is
    captured, or compared with.
    """
    layers = [each for each in network.modules() if parametrize.type_before_parametrizations(each) in _LAYERS]
    layers = [each for each in layers if isinstance(each, (torch.nn.Conv2d, torch.nn.Linear))] or layers
    return _TORCHS if layers and not any(isinstance(each, Leaf) for each in layers) else _OURS
