"""Dense networks by torch's functions, for what captures or proves: they take float64 on every device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpukern.densify import network
from gpukern.densify.epilogues import Activation, Held, Kernels, find
from gpukern.densify.values import Pair

_torch = torch.nn.functional


class InTorch(Kernels):
    """torch's functions in the place of gpukern's."""

    def conv2d(self, network, input, weight, bias, dilation: Pair, groups: int, activation: Activation | None):
        result = _torch.conv2d(input, weight, bias, 1, 0, dilation, groups)
        return result if activation is None else activation.in_torch(network, result)

    def layer(self, network, weight: Held, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        layer = find(network, weight.name.rpartition(".")[0]) if "." in weight.name else network
        if not isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            return compute()
        with _forward(layer, compute):
            return layer()

    def max_pool2d(self, input, window: Pair, dilation: Pair):
        return _torch.max_pool2d(input, window, 1, 0, dilation)

    def function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        ours = function.__module__ is not None and function.__module__.startswith("gpukern.")
        return getattr(_torch, function.__name__) if ours else function


@contextlib.contextmanager
def _forward(layer: torch.nn.Module, compute: Callable[[], torch.Tensor]) -> Iterator[None]:
    """Let a call of ``layer`` compute something else: what is captured in it bears its name."""
    vars(layer)["forward"] = compute
    try:
        yield
    finally:
        del vars(layer)["forward"]


class DenseNetwork(network.DenseNetwork):
    """The same by torch: the twin of a network that is captured."""

    kernels = InTorch()
