"""Numbers and pictures of a report: a graph's computation and memory traffic for the example, and its drawing."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

from gpukern.fusion.lowering import Lowered
from gpukern.fusion.match import Match
from gpukern.fusion.program import assemble, elements, is_view, module_path, operation, tensor_of, value, value_of_any
from gpukern.fusion.report.values import GraphNode, Totals
from gpukern.version import __version__


def shaped(
    graph: Graph, constants: Mapping[str, torch.Tensor], modules: dict[str, torch.nn.Module], inputs: Sequence[Any]
) -> Graph:
    """A copy of ``graph`` in which every node's ``meta["val"]`` is that of a run for ``inputs``.

    The run is made only where sizes depend on values. A constant has the dtype of its node, if that has one.
    """
    copied = Graph()
    copied.output(copied.graph_copy(graph, {}))
    dtypes = {
        node.target: tensor_of(node).dtype for node in graph.nodes if node.op == "get_attr" and value(node) is not None
    }
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def typed(convert: Callable[[torch.Tensor], torch.Tensor]) -> GraphModule:
        held = {name: convert(tensor).to(dtypes.get(name, tensor.dtype)) for name, tensor in constants.items()}
        return assemble(copied, held, modules)

    with torch.no_grad():
        try:
            module = typed(mode.from_tensor)
            FakeTensorProp(module, mode).propagate(*inputs)
        except RuntimeError:
            module = typed(torch.Tensor.detach)
            _Shapes(module).run(*inputs)
    return module.graph


class _Shapes(Interpreter):
    """Records every node's value, without its data."""

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        node.meta["val"] = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), result)
        return result


def totals(graph: Graph, parameters: int) -> Totals:
    """Return the totals of a graph made by :func:`shaped`."""
    constant: set[Node] = set()
    operators = moved = 0
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (
            node.op == "call_function" and inputs and all(each in constant for each in inputs)
        ):
            constant.add(node)
        if node.op != "call_function" or is_view(node):
            continue
        operators += 1
        moved += sum(_bytes(each) for each in inputs if each not in constant)
        moved += 0 if node in constant else _bytes(node)
    return Totals(operators, parameters, moved)


def _bytes(node: Node) -> int:
    val = node.meta.get("val")
    tensors = val if isinstance(val, (tuple, list)) else [val]
    return sum(elements(each) * each.element_size() for each in tensors if isinstance(each, torch.Tensor))


def constants_of(lowered: Lowered) -> int:
    """Elements of all tensors of numbers that a fused model holds, int8 among them."""
    return sum(
        held.numel() for held in lowered.module.buffers() if held.is_floating_point() or held.dtype is torch.int8
    )


# ---- pictures -------------------------------------------------------------------------------------------------------


def picture_before(graph: Graph, groups: Mapping[str, int]) -> tuple[GraphNode, ...]:
    """``groups``: the number of the group that a node, by its name, became part of; the last of several."""
    return _picture(graph, lambda node: groups.get(node.name), operation)


def picture_after(graph: Graph, matches: Sequence[Match], numbers: Mapping[int, int]) -> tuple[GraphNode, ...]:
    """``numbers``: the number in the report of the match at each place."""

    def group(node: Node) -> int | None:
        return numbers.get(node.meta.get("gpukern_match", -1))

    def label(node: Node) -> str:
        # Casts and views around the kernel belong to its group too.
        plain = "gpukern_match" not in node.meta or is_view(node) or operation(node) == "_to_copy"
        return operation(node) if plain else matches[node.meta["gpukern_match"]].pattern

    return _picture(graph, group, label)


def _picture(graph: Graph, group: Any, label: Any) -> tuple[GraphNode, ...]:
    shown: dict[Node, GraphNode] = {}
    for node in graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and value_of_any(node) is None):
            continue
        words = label(node) if node.op == "call_function" else "input" if node.op == "placeholder" else "output"
        inputs = tuple(each.name for each in node.all_input_nodes if each in shown)
        shown[node] = GraphNode(node.name, words, group(node), inputs)
    return tuple(shown.values())


def modules_of(match: Match, leaves: frozenset[str]) -> tuple[str, ...]:
    """The paths of the layers in a match; of an addition or activation only where a module of its own computes it."""
    layers = {match.core, *(step.node for step in (*match.before, *match.after) if step.name == "batch_norm")}
    paths = []
    for node in match.nodes:
        path = module_path(node)
        if node in layers or path in leaves:
            paths.append(path or node.name)
    return tuple(dict.fromkeys(paths))


def environment(device: torch.device) -> dict[str, str]:
    found = {"gpukern": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {**found, "device": f"{device.type}: {name}"}
