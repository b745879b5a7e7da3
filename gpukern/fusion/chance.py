"""Operators of a captured graph that draw random numbers."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from gpukern.fusion.program import arguments, is_call, title


def draws(graph: Graph) -> list[str]:
    """Describe each operator whose result differs from call to call: "drop (dropout): aten::dropout"."""
    return [f"{title(node)}: {node.target._schema.name}" for node in graph.nodes if is_call(node) and _is_random(node)]


def _is_random(node: Node) -> bool:
    """Dropout and the like are not outside of training, or with a probability of 0."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    given = arguments(node)
    if given.get("train", given.get("training", True)) is False:
        return False
    return not any(given.get(name) == 0 for name in ("p", "dropout_p", "dropout"))
