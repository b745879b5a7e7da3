"""Verification of each match by itself: fused and original operators, both given the original's own values.

In the whole model, errors of all layers accumulate and hide a fault of one layer that is as small as they are. Here a
layer takes the true outputs of the layers before it, so that its error is its own: a few roundings, at any depth.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from gpukern import formatting
from gpukern.fusion.lowering import Lowered, rounded
from gpukern.fusion.match import Match
from gpukern.fusion.program import Program, assemble, first_operand
from gpukern.fusion.spread import f_quantile
from gpukern.fusion.verify import FACTOR, cast, distance, floor, tf32

#: The floor in roundings of sums: half of that for a whole model.
_SUMS = 8.0
#: Directions of an error at least: pixels and samples have some of their own.
_FEWEST = 4


@dataclass(frozen=True)
class Alone:
    """‖y − truth‖ of a match relative to the size of its output, that of the unfused operators, and the bound.

    ``in_whole``: its output's error if the layers before it have theirs.
    """

    match: Match
    in_whole: float
    error: float
    unfused: float
    bound: float


def judge_alone(
    program: Program, matches: Sequence[Match], lowered: Lowered, inputs: Sequence[Any], dtype: torch.dtype
) -> list[Alone]:
    """Judge each match; empty if the program cannot run in fp64, or by its own operators in ``dtype``.

    ``inputs`` are the leaves of an example as the fused module prepares them.
    """
    names = [match.output.name for match in matches]
    sources = [_before_activation(match).name for match in matches]
    graph, _ = program.copy()
    doubled = {name: held.double() if held.is_floating_point() else held for name, held in program.constants.items()}
    try:
        doubles = Recorder(assemble(graph, doubled, program.modules), {*names, *sources})
        truth = doubles.values_for(cast(list(inputs), torch.float64))
        forced = {name: truth[name] for name in names}
        own = Recorder(assemble(graph, rounded(program, graph), program.modules), names, forced).values_for(inputs)
    except (RuntimeError, TypeError):
        return []
    forced = dict(zip(lowered.names, forced.values(), strict=True))
    found = Recorder(lowered.module, lowered.names, forced).values_for(inputs)
    whole = Recorder(lowered.module, lowered.names).values_for(inputs)
    judged = []
    for match, name, lowered_name, source in zip(matches, names, lowered.names, sources, strict=True):
        exact = truth[name]
        # An activation may leave little of its input but the input's roundings.
        size = max(_norm(exact), _norm(truth[source])) or 1.0
        error, unfused = (_norm(each.double() - exact) / size for each in (found[lowered_name], own[name]))
        if not math.isfinite(unfused):
            error = unfused = 0.0  # it overflows in the unfused model too, and is not a reference
        in_whole = distance([whole[lowered_name]], [exact])
        judged.append(Alone(match, in_whole, error, unfused, _bound(match, unfused, exact, inputs, dtype)))
    return judged


def _bound(match: Match, unfused: float, exact: torch.Tensor, inputs: Sequence[Any], dtype: torch.dtype) -> float:
    """The bound of an error. Rounded weights correlate the errors of pixels, not of channels: as many are drawn."""
    channels = exact.shape[-1] if match.core.target is torch.ops.aten.linear.default else exact.shape[1]
    directions = max(channels, _FEWEST)
    by_chance = math.sqrt(f_quantile(directions, directions))
    convolves = match.product is not None and match.product.spatial > 0
    multiplies = match.product is not None and not convolves
    return FACTOR * by_chance * unfused + floor(dtype, _SUMS) + tf32(convolves, multiplies, inputs, dtype)


def what_is_wrong(judged: Sequence[Alone]) -> str | None:
    """Describe the first match that is no longer the same."""
    for each in judged:
        if not each.error <= each.bound:
            names = ", ".join(dict.fromkeys(node.name for node in each.match.nodes))
            error, unfused, bound = map(formatting.error, (each.error, each.unfused, each.bound))
            return (
                f"the fused model is wrong: given the original's own values a group has an error of {error}, "
                f"while the unfused layers have {unfused} and {bound} would do. To blame is "
                f"{each.match.pattern} ({names}), by {each.match.operator}"
            )
    return None


def _before_activation(match: Match) -> Node:
    return match.output if match.activated is None else first_operand(match.activated)


def _norm(values: torch.Tensor) -> float:
    return values.norm().item()


class Recorder(Interpreter):
    """Runs a graph and keeps the values of some nodes; what follows ``forced`` nodes takes other values for theirs."""

    def __init__(
        self, module: GraphModule, wanted: Collection[str], forced: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        super().__init__(module)
        self.wanted, self.forced = set(wanted), forced or {}
        self.found: dict[str, torch.Tensor] = {}

    def values_for(self, inputs: Sequence[Any]) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            self.run(*inputs)
        return self.found

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        if node.name in self.wanted:
            self.found[node.name] = result
        if node.name not in self.forced:
            return result
        return torch.empty_like(result).copy_(self.forced[node.name])  # in the layout that it has
