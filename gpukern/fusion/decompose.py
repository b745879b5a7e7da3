"""gpukern's own operators in a captured graph, as those of torch that matching knows."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from gpukern.fusion.products import ACTIVATIONS
from gpukern.fusion.program import arguments, aten

_TARGETS = {name: target for target, name in ACTIVATIONS.items()}


def write_out(graph: Graph) -> None:
    """A convolution, linear layer, batch norm or activation of gpukern becomes torch's, its epilogue nodes after it."""
    for node in list(graph.nodes):
        if not str(node.target).startswith("gpukern."):
            continue
        given = arguments(node)
        core = _core(node, given)
        if core is None:
            continue
        with graph.inserting_before(node):
            result = core if isinstance(core, Node) else _call(graph, node, *core)
            if given.get("residual") is not None:
                result = _call(graph, node, aten.add.Tensor, (result, given["residual"]))
            name = given.get("activation", given.get("name"))
            if name != "none":
                result = _call(graph, node, *_activation(name, result, given["negative_slope"]))
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def _call(graph: Graph, old: Node, target: Any, args: tuple, kwargs: dict[str, Any] | None = None) -> Node:
    """Every step has the shape and dtype of the last."""
    node = graph.call_function(target, args, kwargs)
    node.meta = dict(old.meta)
    return node


def _core(node: Node, given: dict[str, Any]) -> Any:
    """What comes before the epilogue: a call, or a node that is there already; None for other operators."""
    name = node.target._schema.name.split("::")[1]
    if name == "activation":
        return given["input"]
    operands = tuple(given.get(each) for each in ("input", "weight", "bias"))
    if name == "linear":
        return aten.linear.default, operands
    if name == "batch_norm":
        return aten.batch_norm.default, (*operands, given["mean"], given["var"], False, 0.0, given["eps"], False)
    if name != "conv2d":
        return None
    top, bottom, left, right = given["padding"]
    if (top, left) != (bottom, right):
        return None  # torch's operator pads both sides alike
    geometry = given["stride"], [top, left], given["dilation"], given["groups"]
    return aten.conv2d.default, (*operands, *geometry)


def _activation(name: str, input: Node, slope: float) -> tuple[Any, tuple, dict[str, Any]]:
    if name == "gelu_tanh":
        return aten.gelu.default, (input,), {"approximate": "tanh"}
    return _TARGETS[name], (input, slope) if name == "leaky_relu" else (input,), {}
