"""Simulation of a scheme in fp32: values of exact runs, rounded where the scheme stores eight bits, and what follows.

For ranking only, and fast: of all nodes, those are computed that differ from the exact run. Proofs run the operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from gpukern.fusion.program import elements, value
from gpukern.fusion.quantization.formats import rounded_to
from gpukern.fusion.quantization.network import Layer, Network, typed
from gpukern.fusion.quantization.noise import Score
from gpukern.fusion.quantization.scheme import Scheme
from gpukern.fusion.quantization.weights import seen_weight


class Simulation:
    """An exact run of one batch, all values kept; schemes of the same network are compared with it."""

    def __init__(self, network: Network, leaves: Sequence[Any]) -> None:
        self._module = typed(network, torch.float32)
        self._env = dict[Node, Any]()
        run = Interpreter(self._module, garbage_collect_values=False)
        with torch.no_grad():
            run.run(*(each.float() if _is_floating(each) else each for each in leaves))
        self._env = dict(run.env)

    def score(self, scheme: Scheme) -> Score:
        """How far the outputs of ``scheme`` are from the exact ones."""
        run = Interpreter(self._module, garbage_collect_values=False)
        run.env = dict(self._env)
        other: set[Node] = set()
        (output,) = (node for node in self._module.graph.nodes if node.op == "output")
        with torch.no_grad():
            for node in self._module.graph.nodes:
                self._step(run, node, scheme, other)
        truth, found = (pytree.tree_leaves(torch.fx.map_arg(output.args[0], env.get)) for env in (self._env, run.env))
        score = Score()
        score.add(*([each for each in leaves if isinstance(each, torch.Tensor)] for leaves in (found, truth)))
        return score

    def _step(self, run: Interpreter, node: Node, scheme: Scheme, other: set[Node]) -> None:
        """Compute ``node`` if it is another one in ``scheme``; note that in ``other``."""
        if node.op != "call_function":
            return
        layer = scheme.network.layers.get(node.name) if node.name in scheme.storage.eight else None
        if layer is not None:
            self._give_weights(run, node, layer, scheme)
        changed = layer is not None or any(each in other for each in node.all_input_nodes)
        if changed:
            run.env[node] = run.run_node(node)
        scale = scheme.scale_of(node.name)
        if scale is not None and node.name in scheme.domains.of[node.name].writers:
            run.env[node] = rounded_to(run.env[node], scale, scheme.format)
            changed = True
        if changed:
            other.add(node)

    def _give_weights(self, run: Interpreter, node: Node, layer: Layer, scheme: Scheme) -> None:
        run.env[node.args[1]] = seen_weight(layer, scheme.format).float()  # type: ignore[index]
        bias = scheme.bias_of(layer.name)
        if bias is not None:
            run.env[node.args[2]] = bias.float()  # type: ignore[index]


def bytes_of_a_row(network: Network) -> int:
    """The bytes of all values of an exact run in fp32, per image of the example."""
    tensors = [value(node) for node in network.graph.nodes if node.op == "call_function"]
    total = sum(4 * elements(each) for each in tensors if each is not None)
    first = next((value(node) for node in network.graph.nodes if node.op == "placeholder"), None)
    rows = first.shape[0] if first is not None and first.dim() else 1
    return total // max(int(rows), 1)


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def rows_within(network: Network, rows: int, limit: int) -> int:
    """``rows``, or fewer of which all values take ``limit`` bytes; one at least."""
    return max(1, min(rows, limit // max(bytes_of_a_row(network), 1)))
