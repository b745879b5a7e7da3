"""Constant folding of subgraphs, which weight_norm, spectral_norm and parametrizations compute from weights."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from gpukern.fusion.program import Program, arguments, is_call


def evaluate_constants(program: Program) -> Program:
    """Return ``program`` with a constant for every value that does not depend on the model's input.

    Computed in fp64 where that can be, and kept so: it is rounded once, when the fused weights are.
    """
    graph, _ = program.copy()
    constants = dict(program.constants)
    known: dict[Node, Any] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr" and node.target in constants:
            known[node] = constants[node.target]
        elif node.op == "call_function" and _is_constant(node, known):
            found = _evaluate(node, known)
            if found is not None:
                known[node] = found
    for node, found in known.items():
        if is_call(node) and isinstance(found, torch.Tensor) and any(user not in known for user in node.users):
            name = f"_constant_{node.name}"
            constants[name] = found
            with graph.inserting_before(node):
                held = graph.create_node("get_attr", name, name=name)
            held.meta = dict(node.meta)
            node.replace_all_uses_with(held, delete_user_cb=lambda user: user not in known)
    graph.eliminate_dead_code()
    return program.with_graph(graph, constants)


def _is_constant(node: Node, known: dict[Node, Any]) -> bool:
    inputs = node.all_input_nodes
    if not all(each in known for each in inputs):
        return False
    if not inputs and not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded not in tags and not (is_call(node) and node.is_impure())


def _evaluate(node: Node, known: dict[Node, Any]) -> Any:
    """The value of a call, in fp64 or, for what cannot be computed so, as it was captured; None if not at all."""
    target: Any = node.target
    for exact in (True, False):

        def operand(each: Node, exact: bool = exact) -> Any:
            found = known[each]
            if not isinstance(found, torch.Tensor) or not found.is_floating_point():
                return found
            return found.double() if exact else found.to(each.meta["val"].dtype)

        given, named = torch.fx.map_arg(node.args, operand), torch.fx.map_arg(node.kwargs, operand)
        try:
            with torch.no_grad():
                return target(*given, **named)
        except RuntimeError:
            continue
    return None


# ---- constants that scale and shift channels ------------------------------------------------------------------------


def constant(program: Program, node: Any) -> torch.Tensor | None:
    """The tensor that ``node`` is in every call of the model; None if it depends on the input."""
    if isinstance(node, Node) and node.op == "get_attr":
        return program.constants.get(str(node.target))
    return None


def known_constant(program: Program, node: Any) -> torch.Tensor:
    """:func:`constant` of a node that was found to be one."""
    found = constant(program, node)
    assert found is not None, f"{node} is a constant"
    return found


def all_constant(program: Program, node: Node, *names: str) -> bool:
    """Whether these arguments of a call are constants, or not given."""
    given = arguments(node)
    return all(given[name] is None or constant(program, given[name]) is not None for name in names)
