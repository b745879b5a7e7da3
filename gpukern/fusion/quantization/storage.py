"""Which layers have weights of eight bits, and which domains are stored so, for the layers that shall.

A layer in eight bits reads its input and its residual in eight bits. A domain is stored so if a layer in eight bits
reads it, and all that reads or writes it can do that in eight bits: then no pass converts anything.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch.fx import Node

from gpukern.fusion.program import arguments
from gpukern.fusion.quantization.domains import FIRST, Domain, Domains
from gpukern.fusion.quantization.network import Network


@dataclass(frozen=True)
class Storage:
    """``eight``: names of layers with weights of eight bits. ``stored``: names of nodes whose values are."""

    eight: frozenset[str]
    stored: frozenset[str]


def store(network: Network, found: Domains, wanted: Collection[str]) -> Storage:
    """Store what the layers ``wanted`` in eight bits need; those whose input cannot be stay in 16 bits."""
    needed = [
        domain for domain in found.every if not domain.why_not and {*domain.products, *domain.residuals} & set(wanted)
    ]
    for domain in needed:  # what an average pool before a layer reads is needed too
        sources = (found.of[node.name] for node in _pooled(network, domain))
        needed += [source for source in sources if not source.why_not and source not in needed]
    stored = {id(domain) for domain in needed}
    while True:  # an average pool writes eight bits only where it reads them
        kept = {id(d) for d in found.every if id(d) in stored and not _unwritable(network, found, d, stored)}
        if kept == stored:
            break
        stored = kept
    names = {name for domain in found.every if id(domain) in stored for name in domain.values}
    eight = {name for name in wanted if input_of(network, name).name in names}
    return Storage(frozenset(eight), frozenset(names))


def _unwritable(network: Network, found: Domains, domain: Domain, stored: Collection[int]) -> bool:
    return any(id(found.of[node.name]) not in stored for node in _pooled(network, domain))


def _pooled(network: Network, domain: Domain) -> list[Node]:
    """What the average pools read that write in a domain."""
    pools = [network.names[name] for name in domain.writers if name not in network.layers]
    return [node.all_input_nodes[0] for node in pools]


def input_of(network: Network, layer: str) -> Node:
    """The node that a layer multiplies."""
    return arguments(network.names[layer])["input"]


def why_sixteen(network: Network, found: Domains, layer: str) -> str:
    """Why a layer cannot have eight bits; "": it can."""
    domain = found.of.get(input_of(network, layer).name)
    if domain is None:
        return "its input is of another dtype"
    if domain.why_not == FIRST:
        return "the first layer"
    if not domain.why_not and layer not in store(network, found, (layer,)).eight:
        return "its input is an average of numbers in 16 bits"
    return f"its input: {domain.why_not}" if domain.why_not else ""


def last_layers(network: Network) -> frozenset[str]:
    """Layers after which there is no other layer."""
    leads: set[Node] = set()
    last = []
    for node in reversed(network.graph.nodes):
        if node.name in network.layers and not any(user in leads for user in node.users):
            last.append(node.name)
        if node.name in network.layers or any(user in leads for user in node.users):
            leads.add(node)
    return frozenset(last)
