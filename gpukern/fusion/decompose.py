"""Decomposition of gpukern's operators in a captured graph into those of torch that matching supports."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from gpukern.fusion.program import arguments, tensor_of, value
from gpukern.ops._operators import OPERATORS


def write_out(graph: Graph) -> None:
    """Replace gpukern's operators by their decompositions, the epilogue's nodes after those of its operator."""
    tracer = GraphAppendingTracer(graph)
    for node in list(graph.nodes):
        operator = OPERATORS.get(node.target)
        # Operators with several results are for training.
        if operator is None or operator.decomposition is None or value(node) is None:
            continue
        given = torch.fx.map_arg(tuple(arguments(node).values()), lambda each: Proxy(each, tracer))  # type: ignore[arg-type,return-value]
        before = set(graph.nodes)
        with graph.inserting_before(node):
            result = operator.decomposition(*given).node
        for made in graph.nodes:
            if made not in before:
                made.meta = {**node.meta, "val": _value_of(made, node)}
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def _value_of(made: Node, whole: Node) -> Any:
    """The shape and dtype of a part; in the dtype of the ``whole`` where operands of several are rounded once."""
    given = torch.fx.map_arg((made.args, made.kwargs), lambda each: each.meta["val"])
    dtype = tensor_of(whole).dtype
    args, kwargs = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda each: each.to(dtype) if each.is_floating_point() else each, given
    )
    target: Any = made.target
    return target(*args, **kwargs)
