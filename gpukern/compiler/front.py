"""The matcher's front for training: a batch norm of any statistics runs with the product before it.

Weights are arguments here, and change. Nothing is folded into them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeGuard

from torch.fx import Graph, Node

from gpukern.fusion.affine import is_batch_norm
from gpukern.fusion.match import Match
from gpukern.fusion.matcher import Finder, Found
from gpukern.fusion.products import Product
from gpukern.fusion.program import arguments, operation, sole_user, tensor_of, value
from gpukern.runtime.tensors import KERNEL_DTYPES


def find(graph: Graph, skip: Sequence[str] = ()) -> Found:
    """Find what runs together in a graph of :func:`gpukern.compiler.aten_graph.read`, and what does not."""
    return _Training(graph, skip).find()


class _Training(Finder):
    def why_no_product(self, found: Product) -> str | None:
        output = value(found.node)
        if output is None or output.dtype not in KERNEL_DTYPES:
            return "computes several tensors" if output is None else f"computes in {output.dtype}"
        if found.kind != "linear" and not found.has_channels:
            return "takes one sample without a batch dimension"
        apart = found.operator.startswith("aten") or found.spatial == 3  # no step computes volumes
        return f"the backend has no step for {found.kind}" if apart else None

    def with_norms(self, match: Match) -> Match:
        match = self.with_zeros(match)
        user = sole_user(match.output)
        takes = match.own_product.has_channels and not match.own_product.transposed
        if not takes or not self.may_follow(user, match) or not is_batch_norm(user) or _why_no_norm(user):
            return match
        if arguments(user)["input"] is not match.output:
            return match
        self.taken.add(user)
        return replace(match, norm=user, output=user)

    def may_follow(self, node: Node | None, match: Match) -> TypeGuard[Node]:
        if not self.may_take(node) or node.meta["region"] != match.core.meta["region"]:
            return False
        return not any(self.are_used_between(norm, match.core, node) for norm in (*match.nodes, node))

    def are_used_between(self, norm: Node, first: Node, last: Node) -> bool:
        """Whether other nodes between two use the running statistics of a batch norm, which may move to either."""
        if not is_batch_norm(norm):
            return False
        kept = (arguments(norm)[name] for name in ("running_mean", "running_var"))
        users = (user for each in kept if isinstance(each, Node) for user in each.users if user is not norm)
        return any(self.order[first] < self.order[user] < self.order[last] for user in users)

    def may_stand_alone(self, norm: Node) -> bool:
        return _why_no_norm(norm) is None

    def why_norm_stays(self, norm: Node, reason: str) -> str:
        return _why_no_norm(norm) or reason

    def with_pool(self, match: Match) -> Match:
        return match  # its backward needs what the pool takes


def _why_no_norm(norm: Node) -> str | None:
    """Return the reason why gpukern does not compute a batch norm; None if it does."""
    if not is_batch_norm(norm):
        return f"{operation(norm)} runs as it is"
    input = tensor_of(arguments(norm)["input"])
    return None if input.dtype in KERNEL_DTYPES else f"computes in {input.dtype}"
