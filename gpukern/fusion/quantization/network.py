"""The folded network in exact weights, and runs of it in fp32 or fp64 that watch its values.

Its graph is that of the 16-bit model, whose nodes keep their names: what is measured here is what will be computed in
eight bits there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Interpreter, Node

from gpukern.fusion.describe import shaped
from gpukern.fusion.folding import exact
from gpukern.fusion.lowering import Lowered
from gpukern.fusion.match import Match
from gpukern.fusion.program import Program, arguments, assemble, tensor_of, value

_ops = torch.ops.gpukern
#: Operators that have a form in eight bits, and multiply by weights.
PRODUCTS = (_ops.conv2d.default, _ops.conv2d_max_pool2d.default, _ops.conv_transpose2d.default, _ops.linear.default)
#: What is called with a node's name, value, and the values that it was computed from.
See = Callable[[Node, Any, tuple], None]


@dataclass(frozen=True)
class Layer:
    """A group that multiplies: ``name`` of its node in the graph, its place among the matches, exact weights in fp64.

    ``dim``: where in the weight the output channels lie.
    """

    name: str
    place: int
    match: Match
    weight: torch.Tensor
    bias: torch.Tensor | None
    dim: int
    groups: int

    @property
    def channels(self) -> int:
        """How many output channels it has."""
        return self.weight.shape[1] * self.groups if self.dim else self.weight.shape[0]


@dataclass(frozen=True)
class Network:
    """``graph`` has in every node's ``meta["val"]`` its shape and dtype for the example; ``precision``: the dtype that
    it was captured in. ``held``: its constants in 16 bits. ``layers`` by their names, in order."""

    graph: Graph
    program: Program
    precision: torch.dtype
    layers: dict[str, Layer]
    held: Mapping[str, torch.Tensor]
    names: dict[str, Node] = field(default_factory=dict)

    def with_layers(self, layers: Mapping[str, Layer]) -> Network:
        return replace(self, layers={**self.layers, **layers})


def network_of(
    program: Program, matches: Sequence[Match], lowered: Lowered, prepared: Sequence[Any], precision: torch.dtype
) -> Network:
    """The network of a model that was lowered in ``precision``; ``prepared``: the example as its graph takes it."""
    held = dict(lowered.module.named_buffers(remove_duplicate=False))
    graph = shaped(lowered.module.graph, held, program.modules, prepared)
    layers = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in PRODUCTS and "gpukern_match" in node.meta:
            layer = _layer(program, matches, node)
            if tensor_of(node).dtype is precision:
                layers[node.name] = layer
    names = {node.name: node for node in graph.nodes}
    return Network(graph, program, precision, layers, held, names)


def _layer(program: Program, matches: Sequence[Match], node: Node) -> Layer:
    place = node.meta["gpukern_match"]
    given = arguments(node)
    weight, bias = exact(program, matches[place])
    shape = tensor_of(given["weight"]).shape
    dim = int(node.target is _ops.conv_transpose2d.default)
    return Layer(node.name, place, matches[place], weight.reshape(shape), bias, dim, given.get("groups", 1))


class Run(Interpreter):
    """Runs a network's graph in ``dtype`` and lets ``see`` watch every node's value; ``change`` may exchange it."""

    def __init__(
        self,
        network: Network,
        dtype: torch.dtype = torch.float32,
        see: See | None = None,
        change: Callable[[Node, Any], Any] | None = None,
    ) -> None:
        super().__init__(typed(network, dtype))
        self.see, self.change, self.dtype = see, change, dtype

    def outputs(self, leaves: Sequence[Any]) -> tuple:
        """Run it on the leaves of a batch; floating-point numbers are cast."""
        with torch.no_grad():
            return self.run(*(_cast(leaf, self.dtype) for leaf in leaves))

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        if self.change is not None:
            result = self.change(node, result)
        if self.see is not None and node.op == "call_function":
            args, _ = self.fetch_args_kwargs_from_env(node)
            self.see(node, result, args)
        return result


def typed(network: Network, dtype: torch.dtype) -> GraphModule:
    """The graph with exact constants, and all that was of the capture's dtype in ``dtype``."""
    graph = Graph()
    graph.output(graph.graph_copy(network.graph, {}))
    constants = {name: _cast(network.program.constants.get(name, held), dtype) for name, held in network.held.items()}
    for node in graph.nodes:
        if node.op == "call_function":
            node.args = _in(node.args, network.precision, dtype)
            node.kwargs = _in(node.kwargs, network.precision, dtype)
        if node.name in network.layers:
            layer, given = network.layers[node.name], arguments(node)
            constants[given["weight"].target] = layout_of(network, given["weight"], layer.weight.to(dtype))
            name = f"{node.name}_exact_bias"
            bias = layer.weight.new_zeros(layer.channels) if layer.bias is None else layer.bias
            constants[name] = bias.to(dtype)
            with graph.inserting_before(node):
                node.update_arg(2, graph.create_node("get_attr", name, name=name))
    return assemble(graph, constants, network.program.modules)


def layout_of(network: Network, held: Node, weight: torch.Tensor) -> torch.Tensor:
    """``weight`` with the strides' order of the constant that it takes the place of."""
    old = network.held[str(held.target)]
    last = old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last)
    return weight.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _in(args: Any, old: torch.dtype, new: torch.dtype) -> Any:
    return torch.fx.node.map_aggregate(args, lambda each: new if each is old else each)


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf


def is_sixteen_bits(network: Network, node: Node) -> bool:
    """Whether a node is a tensor of the network's precision."""
    found = value(node)
    return found is not None and found.dtype is network.precision
