"""Domains: values of a graph that are the same numbers, moved, and so have one scale; and what reads and writes them.

Views, max pools, zero padding and nearest upsampling move numbers; a concatenation joins the domains of all that it is
made of.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from gpukern.fusion.program import arguments, aten, is_call, tensor_of, value, value_of_any
from gpukern.fusion.quantization.network import Network, is_sixteen_bits

_ops = torch.ops.gpukern
#: What moves numbers of its first operand and makes no others but zeros.
_MOVES = frozenset(
    (
        *(aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.unflatten.int),
        *(aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
        *(aten.permute.default, aten.transpose.int, aten.t.default, aten.expand.default, aten.repeat.default),
        *(aten.slice.Tensor, aten.select.int, aten.narrow.default, aten.split.Tensor, aten.chunk.default),
        *(aten.split_with_sizes.default, aten.unbind.int, operator.getitem, aten.flip.default, aten.roll.default),
        *(aten.clone.default, aten.contiguous.default, aten.pixel_shuffle.default, aten.pixel_unshuffle.default),
        *(aten.channel_shuffle.default, aten.upsample_nearest2d.default, aten.upsample_nearest2d.vec),
        _ops.max_pool2d.default,
    )
)
_JOINS = frozenset((aten.cat.default, aten.stack.default))
#: Why the model's inputs are in 16 bits.
FIRST = "an input of the model"
AVERAGES = frozenset((_ops.avg_pool2d.default, _ops.adaptive_avg_pool2d.default, aten.mean.dim))


@dataclass(eq=False)
class Domain:
    """``values``: the nodes. ``products``, ``residuals`` and ``averages``: nodes that read it as such; ``writers``: the
    layers and average pools that make its numbers. ``why_not``: why it cannot be stored in eight bits; "": it can."""

    values: list[str] = field(default_factory=list)
    products: list[str] = field(default_factory=list)
    residuals: list[str] = field(default_factory=list)
    averages: list[str] = field(default_factory=list)
    writers: list[str] = field(default_factory=list)
    why_not: str = ""


@dataclass(frozen=True)
class Domains:
    """``of``: the domain of a node by its name."""

    every: list[Domain]
    of: dict[str, Domain]


def domains_of(network: Network) -> Domains:
    """Find the domains of a network's 16-bit values."""
    root = _joined(network)
    found: dict[str, Domain] = {}
    of = {}
    for node in network.graph.nodes:
        if node.name in root:
            of[node.name] = domain = found.setdefault(_root(root, node.name), Domain())
            domain.values.append(node.name)
    for node in network.graph.nodes:
        if node.name in of:
            _read(network, node, of)
            _written(network, node, of[node.name])
    return Domains(list(found.values()), of)


def is_move(network: Network, node: Node) -> bool:
    """Whether a call moves numbers of 16 bits, and can do so with those of eight."""
    if not is_call(node, *_MOVES, *_JOINS, aten.constant_pad_nd.default):
        return False
    first = _sources(node)
    if not first or not all(map(_is_value, first)):
        return False
    if node.target is aten.constant_pad_nd.default and arguments(node)["value"] != 0:
        return False
    made = value_of_any(node)
    return made is not None and made.dtype is network.precision


def _sources(node: Node) -> list[Any]:
    return list(node.args[0]) if node.target in _JOINS else [node.args[0]]  # type: ignore[arg-type]


def _is_value(node: Any) -> bool:
    return isinstance(node, Node) and node.op != "get_attr"


def _joined(network: Network) -> dict[str, str]:
    """The parent of each value, itself for the first of a domain."""
    root: dict[str, str] = {}
    for node in network.graph.nodes:
        made = value_of_any(node) if node.op in ("call_function", "placeholder") else None
        if made is None or made.dtype is not network.precision:
            continue
        root[node.name] = node.name
        if is_move(network, node):
            for source in _sources(node):
                if source.name in root:
                    root[_root(root, node.name)] = _root(root, source.name)
    return root


def _root(root: dict[str, str], name: str) -> str:
    while root[name] != name:
        name = root[name]
    return name


def _read(network: Network, node: Node, of: dict[str, Domain]) -> None:
    """Note every user of ``node`` that is not a move within its domain."""
    domain = of[node.name]
    for user in node.users:
        if user.name in of and of[user.name] is domain and is_move(network, user):
            continue
        if user.name in network.layers:
            given = arguments(user)
            if given["input"] is node:
                domain.products.append(user.name)
            if given.get("residual") is node:
                domain.residuals.append(user.name)
        elif is_average(network, user):
            domain.averages.append(user.name)
        elif user.op == "output":
            domain.why_not = domain.why_not or "an output of the model"
        elif value_of_any(user) is not None:
            domain.why_not = domain.why_not or f"{user.name} reads it in 16 bits"


def _written(network: Network, node: Node, domain: Domain) -> None:
    if is_move(network, node):
        return
    if node.name in network.layers or is_average(network, node):
        domain.writers.append(node.name)
    elif node.op == "placeholder":
        domain.why_not = domain.why_not or FIRST
    else:
        domain.why_not = domain.why_not or f"{node.name} writes it in 16 bits"


def is_average(network: Network, node: Node) -> bool:
    """Whether a call averages pixels of images, as one of gpukern's pools in eight bits does."""
    if not is_call(node, *AVERAGES) or not is_sixteen_bits(network, node):
        return False
    input = value(node.args[0])
    if input is None or input.dtype is not network.precision or input.dim() != 4:
        return False
    if node.target is not aten.mean.dim:
        return True
    given = arguments(node)
    return given["dtype"] is None and sorted(dim % 4 for dim in given["dim"] or ()) == [2, 3]


def averaged_size(node: Node) -> list[int]:
    """The output size of an adaptive pool or a mean over all pixels."""
    return [1, 1] if node.target is aten.mean.dim else list(arguments(node)["output_size"])


def keeps_rank(node: Node) -> bool:
    """Whether an average of pixels has four dimensions, as its input has."""
    return tensor_of(node).dim() == 4
