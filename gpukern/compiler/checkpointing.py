"""Activation checkpointing inside a graph: ``torch.utils.checkpoint.checkpoint`` of the part that Dynamo set apart.

Dynamo records a checkpoint as a higher-order operator that only tags its nodes, for a partitioner to act on. Run as it
is, it saves everything; a backend that runs its graphs eagerly has to checkpoint itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import checkpoint

_Compiled = TypeVar("_Compiled")


def replace(graph: Graph, module: GraphModule, compile: Callable[[GraphModule], _Compiled]) -> dict[str, _Compiled]:
    """Let the checkpoints of ``graph`` be checkpoints; return the compiled parts by their names in ``module``."""
    parts: dict[str, _Compiled] = {}
    for node in list(graph.nodes):
        if node.target is torch.ops.higher_order.tag_activation_checkpoint and _part(node) is not None:
            name = _part(node)
            parts[name] = compile(getattr(module, name))
            node.target = _run
            node.kwargs = {key: each for key, each in node.kwargs.items() if key in _ARGUMENTS}
    return parts


def _part(node: Node) -> Any:
    held = node.args[0]
    return held.target if isinstance(held, Node) and held.op == "get_attr" else None


#: Those of ``checkpoint`` that Dynamo passes on.
_ARGUMENTS = ("preserve_rng_state", "determinism_check", "context_fn", "debug")


def _run(part: GraphModule, *operands: Any, **arguments: Any) -> Any:
    if not torch.is_grad_enabled():
        return part(*operands)
    return checkpoint(part, *operands, use_reentrant=False, **arguments)
