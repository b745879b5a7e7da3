"""A fused graph that calls gpukern's functions, not its registered operators, which cost tens of microseconds more.

A tracer still sees the operators: see :mod:`gpukern.runtime.operator`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Graph, GraphModule, Node

from gpukern.ops._operators import OPERATORS
from gpukern.runtime.operator import Operator


def _named(operator: Operator) -> Callable[..., Any]:
    """``operator`` as a function: generated code refers to what it calls by name."""

    def call(*arguments: Any) -> Any:
        return operator(*arguments)

    call.__name__ = call.__qualname__ = f"call_{operator.overload._schema.name.split('::')[1]}"
    return call


_FUNCTIONS = {overload: _named(operator) for overload, operator in OPERATORS.items()}
# Unpickled generated code looks for them here.
globals().update({function.__name__: function for function in _FUNCTIONS.values()})


def call_directly(module: GraphModule) -> GraphModule:
    """Return a copy of ``module`` on the same tensors that calls the functions."""
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        call_one_directly(node)
    return GraphModule(module, graph)


def call_one_directly(node: Node) -> None:
    """Let ``node`` call the function if it calls an operator."""
    if node.op == "call_function" and node.target in _FUNCTIONS and not node.kwargs:
        node.target = _FUNCTIONS[node.target]
        # Sizes are keys of caches: tuples.
        node.args = tuple(tuple(each) if isinstance(each, list) else each for each in node.args)
