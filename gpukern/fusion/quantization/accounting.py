"""The report of a model in eight bits: precision, scales, noise and bytes of every group, and the totals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from gpukern.fusion import describe
from gpukern.fusion.lowering import Lowered
from gpukern.fusion.match import Match
from gpukern.fusion.program import Program, elements, is_view
from gpukern.fusion.quantization.noise import Energies
from gpukern.fusion.quantization.scheme import Scheme
from gpukern.fusion.quantization.storage import input_of
from gpukern.fusion.report import QuantizedGroup


@dataclass
class Moved:
    """Bytes that a pass moves for the example, weights included: in all, and by the place of each match."""

    total: int = 0
    by_place: dict[int, int] = field(default_factory=dict)


def moved(program: Program, lowered: Lowered, prepared: Sequence[Any]) -> Moved:
    """Return what a lowered model moves."""
    held = dict(lowered.module.named_buffers(remove_duplicate=False))
    graph: Graph = describe.shaped(lowered.module.graph, held, program.modules, prepared)
    found = Moved()
    for node in graph.nodes:
        if node.op != "call_function" or is_view(node):
            continue
        bytes_of_node = sum(map(_bytes, {*node.all_input_nodes, node}))
        found.total += bytes_of_node
        place = node.meta.get("gpukern_match")
        if place is not None:
            found.by_place[place] = found.by_place.get(place, 0) + bytes_of_node
    return found


def _bytes(node: Node) -> int:
    val = node.meta.get("val")
    tensors = val if isinstance(val, (tuple, list)) else [val]
    return sum(elements(each) * each.element_size() for each in tensors if isinstance(each, torch.Tensor))


def groups(
    scheme: Scheme,
    matches: Sequence[Match],
    leaves: frozenset[str],
    noise: Sequence[Energies] | None,
    costs: Mapping[str, float],
    reasons: Mapping[str, str],
    given_back: Sequence[str],
    before: Moved,
    after: Moved,
) -> tuple[QuantizedGroup, ...]:
    """A row for each layer. ``reasons``: why those in 16 bits are; ``costs``: the noise of each alone."""
    found = []
    for name, layer in scheme.network.layers.items():
        eight = name in scheme.storage.eight
        read = input_of(scheme.network, name).name
        energies = noise[layer.place] if noise is not None else None
        found.append(
            QuantizedGroup(
                modules=describe.modules_of(matches[layer.place], leaves),
                pattern=matches[layer.place].pattern,
                precision=str(scheme.format) if eight else str(scheme.network.precision).removeprefix("torch."),
                why="" if eight else reasons.get(name, ""),
                input_scale=scheme.scale_of(read),
                output_scale=scheme.scale_of(name),
                calibration=scheme.estimators.get(read, "") if scheme.scale_of(read) is not None else "",
                snr=energies.snr if energies is not None and energies.signal else None,
                noise=costs.get(name),
                bytes=after.by_place.get(layer.place, 0),
                bytes_before=before.by_place.get(layer.place, 0),
                equalized=name in scheme.rescaled,
                corrected=eight and name in scheme.corrections,
                given_back=name in given_back,
            )
        )
    return tuple(found)
