"""Bias correction: the mean error that rounding a layer's weights and input makes in each output channel, taken off.

    b' = b − E[(Q(w) − w) ∗ x + Q(w) ∗ (Q(x) − x)]

from the batches observed; a layer keeps it if it lowers its error on the batches kept aside.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from gpukern.fusion.quantization.data import Leaves
from gpukern.fusion.quantization.formats import rounded_to
from gpukern.fusion.quantization.network import Run
from gpukern.fusion.quantization.reference import product
from gpukern.fusion.quantization.scheme import Scheme
from gpukern.fusion.quantization.storage import input_of
from gpukern.fusion.quantization.weights import seen_weight


@dataclass
class _Errors:
    """Of each output channel: sums of errors and their squares, and how many there were."""

    sums: torch.Tensor | float = 0.0
    squares: torch.Tensor | float = 0.0
    count: int = 0

    def add(self, error: torch.Tensor, channels_last: bool) -> None:
        rows = error.flatten(0, -2) if channels_last else error.transpose(0, 1).flatten(1).T
        rows = rows.double()
        self.sums, self.squares = self.sums + rows.sum(0), self.squares + rows.square().sum(0)
        self.count += len(rows)

    def energy(self, correction: torch.Tensor) -> torch.Tensor:
        """Σ (e + c)² of all channels."""
        squares = self.squares + 2 * correction * self.sums + self.count * correction.square()
        return squares.sum()


@dataclass
class _Watch:
    scheme: Scheme
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    errors: dict[str, _Errors] = field(default_factory=dict)

    def see(self, node: Node, result: torch.Tensor, args: tuple) -> None:
        if node.name not in self.scheme.storage.eight or not result.numel():
            return
        x, weight = args[:2]
        scale = self.scheme.scale_of(input_of(self.scheme.network, node.name).name)
        rounded = x if scale is None else rounded_to(x, scale, self.scheme.format)
        if node.name not in self.weights:
            seen = seen_weight(self.scheme.network.layers[node.name], self.scheme.format)
            self.weights[node.name] = seen.to(weight.dtype)
        error = product(node, rounded, self.weights[node.name]) - product(node, x, weight)
        linear = node.target is torch.ops.gpukern.linear.default
        self.errors.setdefault(node.name, _Errors()).add(error, linear)


def errors_of(scheme: Scheme, batches: Iterable[Leaves]) -> dict[str, _Errors]:
    """The errors of each layer in eight bits, given the values of an exact run."""
    watch = _Watch(scheme)
    run = Run(scheme.network, see=watch.see)
    for leaves in batches:
        run.outputs(leaves)
    return watch.errors


def corrections(scheme: Scheme, observed: Iterable[Leaves], aside: Iterable[Leaves]) -> dict[str, torch.Tensor]:
    """What to add to the biases of layers, where that lowers the error aside."""
    found = {}
    known, judged = errors_of(scheme, observed), errors_of(scheme, aside)
    for name, errors in known.items():
        if not errors.count or name not in judged:
            continue
        correction = -torch.as_tensor(errors.sums) / errors.count
        if judged[name].energy(correction) < judged[name].energy(torch.zeros_like(correction)):
            found[name] = correction
    return found
