"""Cross-layer equalization: a channel between two layers divided in the first and multiplied in the second.

    relu(w₁ x + b₁) = r · relu(w₁/r · x + b₁/r),   w₂ (r · y) = (r w₂) y

for r > 0 changes nothing in exact arithmetic, and levels the ranges of channels, which share one scale in the tensor
between the layers. Not through a clamp, as that of ReLU6, nor where anything else reads or writes the channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from gpukern.fusion.folding import grouped, scaled
from gpukern.fusion.program import arguments, is_call, sole_user
from gpukern.fusion.quantization.domains import Domains
from gpukern.fusion.quantization.formats import by_channel
from gpukern.fusion.quantization.network import Layer, Network

_ops = torch.ops.gpukern
#: Activations with f(r x) = r f(x).
_HOMOGENEOUS = ("none", "relu", "leaky_relu")
#: Rounds over the pairs of a chain: each pair changes its neighbours.
_ROUNDS = 10
#: What a channel is divided by, at most and at least.
_LIMIT = 1e4


@dataclass(frozen=True)
class Equalized:
    """``network`` with other weights; ``divided``: by how much the channels of a layer's output are."""

    network: Network
    divided: Mapping[str, torch.Tensor]


def chains(network: Network, found: Domains, layers: Collection[str]) -> list[list[str]]:
    """Sequences of layers, each of which alone reads what the one before alone writes."""
    follows = {}
    for name in layers:
        second = _second(network, found, name)
        if second is not None and second in layers:
            follows[name] = second
    starts = [name for name in follows if name not in follows.values()]
    made = []
    for name in starts:
        chain = [name]
        while chain[-1] in follows:
            chain.append(follows[chain[-1]])
        made.append(chain)
    return made


def _second(network: Network, found: Domains, name: str) -> str | None:
    node = network.names[name]
    given, domain = arguments(node), found.of.get(name)
    if domain is None or given["activation"] not in _HOMOGENEOUS or given.get("residual") is not None:
        return None
    if domain.writers != [name] or len(domain.products) != 1 or domain.residuals or domain.averages or domain.why_not:
        return None
    user: Node | None = node
    while user is not None:  # a max pool in between keeps channels apart
        user = sole_user(user)
        if user is not None and user.name in network.layers:
            return user.name if _channels_in(network.layers[user.name]) == network.layers[name].channels else None
        if user is None or not is_call(user, _ops.max_pool2d.default):
            return None
    return None


def _channels_in(layer: Layer) -> int:
    return layer.weight.shape[0] if layer.dim else layer.weight.shape[1] * layer.groups


def equalized(network: Network, chain: list[str]) -> Equalized:
    """Level the ranges along a chain."""
    layers = {name: network.layers[name] for name in chain}
    divided = {name: layers[name].weight.new_ones(layers[name].channels) for name in chain[:-1]}
    for _ in range(_ROUNDS):
        for first, second in itertools.pairwise(chain):
            by = _factors(layers[first], layers[second])
            by = (divided[first] * by).clamp(1 / _LIMIT, _LIMIT) / divided[first]
            layers[first], layers[second] = _output_divided(layers[first], by), _input_times(layers[second], by)
            divided[first] = divided[first] * by
    return Equalized(network.with_layers(layers), divided)


def _factors(first: Layer, second: Layer) -> torch.Tensor:
    """√(r₁ / r₂) of the largest weights of each channel in both layers; 1 where one has none."""
    before = by_channel(first.weight, first.dim, first.groups).abs().amax(1)
    split = grouped(second.weight, second.groups)  # [G, K/G, C/G, ...], transposed [G, C/G, K/G, ...]
    others = [dim for dim in range(1, split.dim()) if dim != (1 if second.dim else 2)]
    inputs = split.abs().amax(others)
    after = inputs.flatten()
    usable = (before > 0) & (after > 0)
    return torch.where(usable, (before / torch.where(usable, after, 1.0)).sqrt(), 1.0)


def _output_divided(layer: Layer, by: torch.Tensor) -> Layer:
    weight = scaled(layer.weight, by.reciprocal(), layer.groups, dim=layer.dim)
    return replace(layer, weight=weight, bias=None if layer.bias is None else layer.bias / by)


def _input_times(layer: Layer, by: torch.Tensor) -> Layer:
    return replace(layer, weight=scaled(layer.weight, by, layer.groups, dim=1 - layer.dim))
