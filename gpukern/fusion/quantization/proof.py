"""Proof of a model in eight bits: every operator by itself, element by element, and the noise of every group.

An operator is given what it is given in the model, and must return what its formula says of that in fp64, from the
model's exact weights and the scheme's scales: no more than half a step away, and a few roundings of sums. What the
rounding to steps does to the network is noise, and measured against the original in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import Interpreter, Node

from gpukern.fusion.alone import Recorder
from gpukern.fusion.errors import FusionError
from gpukern.fusion.lowering import Lowered
from gpukern.fusion.match import Match
from gpukern.fusion.program import Program, arguments, assemble
from gpukern.fusion.quantization import reference
from gpukern.fusion.quantization.data import Leaves
from gpukern.fusion.quantization.domains import is_average
from gpukern.fusion.quantization.formats import along_channels, half_a_step
from gpukern.fusion.quantization.network import Layer
from gpukern.fusion.quantization.noise import Energies
from gpukern.fusion.quantization.rewriting import OF
from gpukern.fusion.quantization.scheme import Scheme
from gpukern.fusion.verify import cast

#: Roundings to fp32 of a sum of n numbers, of the sum of their magnitudes: this plus as many times √n.
_ROUNDINGS = 8.0
#: Of the largest result: activations are computed in fp32 by functions of their own.
_OF_ACTIVATION = 1e-5


class Proof(Interpreter):
    """Runs the model in eight bits and checks each operator that reads or writes them. FusionError names a wrong one.

    ``noise``: by the place of a match, its output beside the truth, over all batches.
    """

    def __init__(self, scheme: Scheme, lowered: Lowered, base: Lowered, matches: Sequence[Match]) -> None:
        super().__init__(lowered.module)
        self.scheme, self.matches = scheme, matches
        self._places = {name: place for place, name in enumerate(lowered.names)}
        self._names = base.names
        layers = scheme.network.layers
        self._divided = {layers[name].place: by for name, by in scheme.equalized.items()}
        self.noise = [Energies() for _ in matches]
        self._truth: dict[str, torch.Tensor] = {}
        self._checks = True

    def run_batch(self, prepared: Leaves, truth: dict[str, torch.Tensor], check: bool = True) -> None:
        """Run a batch; ``truth``: the original's values by the names of its nodes. ``check``: each operator too."""
        self._truth, self._checks = truth, check
        with torch.no_grad():
            self.run(*prepared)

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        if self._checks and OF in node.meta:
            old = self.scheme.network.names[node.meta[OF]]
            args, _ = self.fetch_args_kwargs_from_env(node)
            if isinstance(result, torch.Tensor) and result.numel():
                self._check(old, node, result, args)
        place = self._places.get(node.name)
        if place is not None and self._truth:
            self._compare(place, result)
        return result

    def _compare(self, place: int, result: torch.Tensor) -> None:
        name = self._names[place]
        found = result.double() * (self.scheme.scale_of(name) or 1.0)
        truth = self._truth[self.matches[place].output.name]
        divided = self._divided.get(place)
        if divided is not None:
            channels = truth.dim() - 1 if self.matches[place].own_product.spatial == 0 else 1
            found = found * divided.view([-1 if dim == channels else 1 for dim in range(truth.dim())])
        self.noise[place].add(found, truth)

    # ---- each by itself ----

    def _check(self, old: Node, node: Node, result: torch.Tensor, args: tuple) -> None:
        layer = self.scheme.network.layers.get(old.name)
        if layer is None and not is_average(self.scheme.network, old):
            return
        sources = [each for each in old.all_input_nodes if each.op != "get_attr"]
        x = self._seen(sources[0], args[0])
        if layer is None:
            expected = reference.average(old, x)
            self._require(old, node, result, expected, self._allowed(expected, expected.abs(), 1))
            return
        weight = self._weight(layer, node, args)
        bias = self.scheme.bias_of(layer.name)
        residual = arguments(old).get("residual")
        added = None if residual is None else self._seen(residual, args[4])
        expected, size = reference.layer(old, x, weight, bias, added)
        terms = weight.numel() // max(layer.channels, 1)
        self._require(old, node, result, expected, self._allowed(expected, size, terms))

    def _seen(self, source: Node, x: torch.Tensor) -> torch.Tensor:
        return x.double() * (self.scheme.scale_of(source.name) or 1.0)

    def _weight(self, layer: Layer, node: Node, args: tuple) -> torch.Tensor:
        """The weight with which a node computes, in fp64, checked against the exact one."""
        held, scale = args[1], args[2]
        input_scale = self.scheme.scale_of(self.scheme.network.names[layer.name].all_input_nodes[0].name) or 1.0
        by_channel = scale.double() / input_scale if scale is not None else held.new_ones(layer.channels).double()
        weight = held.double() * along_channels(by_channel, layer.weight, layer.dim, layer.groups)
        error = (weight - layer.weight).abs()
        if layer.name in self.scheme.storage.eight:
            steps = along_channels(by_channel, layer.weight, layer.dim, layer.groups)
            allowed = half_a_step(layer.weight, steps, self.scheme.format)
        else:
            info = torch.finfo(self.scheme.network.precision)
            allowed = layer.weight.abs() * info.eps + info.smallest_normal * info.eps
        if not (error <= allowed * (1 + 1e-4)).all():
            self._blame(layer, "its weights are not the model's")
        return weight

    def _allowed(self, expected: torch.Tensor, size: torch.Tensor, terms: int) -> torch.Tensor:
        sums = 2.0**-24 * (_ROUNDINGS + 4 * math.sqrt(terms)) * size * 2
        return sums + _OF_ACTIVATION * expected.abs().max()

    def _require(
        self, old: Node, node: Node, result: torch.Tensor, expected: torch.Tensor, allowed: torch.Tensor
    ) -> None:
        scale = self.scheme.scale_of(old.name)
        found = result.double() * (scale or 1.0)
        if scale is None:
            info = torch.finfo(result.dtype)
            allowed = allowed + expected.abs() * info.eps + info.smallest_normal * info.eps
            same = (found - expected).abs() <= allowed
            same |= (expected.abs() >= info.max) & ~found.isfinite()
        else:
            largest = scale * self.scheme.format.largest
            expected = expected.clamp(-largest, largest)
            steps = half_a_step(expected, torch.tensor(scale, dtype=torch.float64), self.scheme.format)
            same = (found - expected).abs() <= allowed + steps * (1 + 1e-4)
        if not same.all():
            worst = ((found - expected).abs() / (scale or expected.abs().max())).nan_to_num(math.inf).max().item()
            unit = "steps" if scale is not None else "of its largest"
            self._blame(self.scheme.network.layers.get(old.name), f"a result is {worst:.2g} {unit} off", old)

    def _blame(self, layer: Layer | None, what: str, old: Node | None = None) -> None:
        name = layer.name if layer is not None else str(old)
        pattern = "an average pool" if layer is None else layer.match.pattern
        raise FusionError(
            f"the fused model is wrong in 8 bits: {what}, given its own input. To blame is {pattern} ({name})"
        )


def true_values(
    program: Program, matches: Sequence[Match], batches: Iterable[Leaves]
) -> Iterable[dict[str, torch.Tensor]]:
    """The outputs of all matches in fp64 for each batch; empty where the program does not run in fp64."""
    graph, _ = program.copy()
    doubled = {name: held.double() if held.is_floating_point() else held for name, held in program.constants.items()}
    run = Recorder(assemble(graph, doubled, program.modules), {match.output.name for match in matches})
    for leaves in batches:
        try:
            yield dict(run.values_for(cast(list(leaves), torch.float64)))
        except (RuntimeError, TypeError):
            yield {}
