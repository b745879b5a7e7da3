"""Activation checkpointing inside a graph: ``torch.utils.checkpoint.checkpoint`` of the part that Dynamo set apart.

Dynamo records a checkpoint as an operator for AOTAutograd's partitioner. Run as it is, it computes the part again under
a dispatch mode, which sees every operator, and with other random numbers: dropout draws another mask in backward. A
backend that runs its graphs eagerly has to checkpoint itself.
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
        name = _part(node)
        if name is not None:
            parts[name] = compile(getattr(module, name))
            node.target = _run
            node.kwargs = {key: each for key, each in node.kwargs.items() if key in _ARGUMENTS}
    return parts


def _part(node: Node) -> str | None:
    """The name of the graph that a checkpoint runs; None for other nodes."""
    if node.target is not torch.ops.higher_order.tag_activation_checkpoint:
        return None
    held = node.args[0]
    return str(held.target) if isinstance(held, Node) and held.op == "get_attr" else None


#: Those of ``checkpoint`` that Dynamo passes on.
_ARGUMENTS = ("preserve_rng_state", "determinism_check", "debug")
#: Where Dynamo keeps the ``context_fn`` of selective checkpointing.
_CONTEXTS = "_checkpoint_context_fn"


def _run(part: GraphModule, *operands: Any, **arguments: Any) -> Any:
    if not torch.is_grad_enabled():
        return part(*operands)
    if _CONTEXTS in part.meta:
        arguments["context_fn"] = part.meta[_CONTEXTS]
    # What a checkpoint is given may not change until backward, as running statistics do: those it takes along.
    places = [place for place, each in enumerate(operands) if isinstance(each, torch.Tensor) and each.requires_grad]

    def run(*given: torch.Tensor) -> Any:
        taken = list(operands)
        for place, each in zip(places, given, strict=True):
            taken[place] = each
        return part(*taken)

    return checkpoint(run, *(operands[place] for place in places), use_reentrant=False, **arguments)
