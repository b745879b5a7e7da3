"""Matching of nodes that become one operator: a walk from each product, and each batch norm that follows none.

Nodes of interest to users that get into no match are declined, with the reason, where the decision is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

from torch.fx import Graph, Node

from gpukern.fusion.affine import Affine, as_affine, is_any_batch_norm, is_batch_norm
from gpukern.fusion.conditions import (
    has_kernel,
    other_operand,
    skipped_by,
    why_no_product,
    why_no_residual,
    why_not_foldable,
    why_not_next,
)
from gpukern.fusion.errors import FusionError
from gpukern.fusion.match import Match
from gpukern.fusion.moving import PART_OF
from gpukern.fusion.products import (
    MONOTONE,
    Product,
    activation,
    is_epilogue_pool,
    is_product,
    product,
    zeros_around,
)
from gpukern.fusion.program import (
    Program,
    aten,
    first_operand,
    in_branches,
    is_call,
    operation,
    sole_user,
    title,
    value,
)
from gpukern.fusion.settling import Settled


@dataclass(frozen=True)
class Declined:
    """A product, batch norm, activation or addition that is fused with nothing, and why.

    ``follows`` if it takes the output of a convolution or linear layer; ``asked`` if the caller requested it.
    """

    node: Node
    reason: str
    follows: bool = False
    asked: bool = False


@dataclass(frozen=True)
class Found:
    """``matches`` in the order of their outputs, no node in two; ``declined`` in the order of the computation."""

    matches: list[Match]
    declined: list[Declined]


class Finder:
    """The walk. What a product absorbs besides residual, activation and pool is the front's: a subclass says it."""

    def __init__(self, graph: Graph, skip: Sequence[str] = ()) -> None:
        self.skip = skip
        self.order = {node: number for number, node in enumerate(graph.nodes)}
        self.taken: set[Node] = set()
        self.declined: dict[Node, Declined] = {}

    # ---- what a front decides ----

    def why_no_product(self, found: Product) -> str | None:
        """Return the reason why a product cannot become a match; None if it can."""
        raise NotImplementedError

    def with_norms(self, match: Match) -> Match:
        """Add the batch norms, and what else scales or shifts channels, that run with the product."""
        raise NotImplementedError

    def may_stand_alone(self, norm: Node) -> bool:
        """Whether a batch norm that no product absorbed is a match of its own."""
        raise NotImplementedError

    def why_norm_stays(self, norm: Node, reason: str) -> str:
        """Why a batch norm is in no match, ``reason`` being why it cannot join what comes right before it."""
        raise NotImplementedError

    def inside_branches(self) -> Iterator[Declined]:
        """What is declined because it is not in the graph itself."""
        return iter(())

    # ---- the walk ----

    def find(self) -> Found:
        """Find everything that can be fused, and what cannot."""
        matches = [self.with_norms(Match(node, node, product(node))) for node in self.products()]
        matches += [Match(node, node) for node in self.free_batch_norms()]
        # If two meet in an addition the later takes it: the other's result is available by then.
        matches.sort(key=lambda match: self.order[match.output], reverse=True)
        matches = [self.finished(match) for match in matches]
        self.decline_rest()
        # A batch norm that is alone in its match was not fused with anything.
        fused = {node for match in matches if match.fuses for node in match.nodes}
        declined = [self.declined[node] for node in self.order if node in self.declined and node not in fused]
        matches.sort(key=lambda match: self.order[match.output])
        return Found(matches, [*declined, *self.inside_branches()])

    def finished(self, match: Match) -> Match:
        """Return ``match`` with its epilogue; decline what follows."""
        match = self.with_pool(self.with_activation(self.with_residual(match)))
        # Nodes after the pool would follow the pool without the match too.
        if match.product is not None and match.pool is None:
            self.decline_users(match.output, match)
        return match

    def products(self) -> Iterator[Node]:
        for node in self.order:
            if not is_product(node):
                continue
            why = self.why_no_product(product(node))
            if self.may_take(node) and why is None:
                self.taken.add(node)
                yield node
            else:
                self.decline(node, why or "")
                self.decline_users(node)

    def free_batch_norms(self) -> Iterator[Node]:
        for node in self.order:
            if is_batch_norm(node) and self.may_take(node) and self.may_stand_alone(node):
                self.taken.add(node)
                yield node

    def may_take(self, node: Node | None) -> TypeGuard[Node]:
        return node is not None and node not in self.taken and skipped_by(node, self.skip) is None

    def may_follow(self, node: Node | None, match: Match) -> TypeGuard[Node]:
        """Whether a match may take ``node``, which follows it."""
        return self.may_take(node)

    def with_zeros(self, match: Match) -> Match:
        """Absorb zeros that a separate node puts around the input: the convolution's own padding from now on."""
        product = match.own_product
        node = product.input
        if not product.is_of_images or not self.may_take(node) or sole_user(node) is not match.core:
            return match
        zeros = zeros_around(node)
        if zeros is None:
            return match
        self.taken.add(node)
        return replace(match, zeros=node, product=replace(product, input=first_operand(node), zeros=zeros))

    def with_residual(self, match: Match) -> Match:
        user = sole_user(match.output)
        if not match.takes_residual or not self.may_follow(user, match):
            return match
        if why_no_residual(user, match.output) is not None:
            return match
        self.taken.add(user)
        return replace(match, add=user, residual=other_operand(user, match.output), output=user)

    def with_activation(self, match: Match) -> Match:
        user = sole_user(match.output)
        if not match.takes_activation or not self.may_follow(user, match):
            return match
        found = activation(user)
        if found is None or (match.pool is not None and found[0] not in MONOTONE):
            return match
        self.taken.add(user)
        return replace(match, activation=found, activated=user, output=user)

    def with_pool(self, match: Match) -> Match:
        """Add a max pool, and a monotone activation after it if there was none before."""
        user = sole_user(match.output)
        takes = match.product is not None and match.product.is_of_images and match.add is None
        if not takes or not self.may_follow(user, match) or not is_epilogue_pool(user):
            return match
        self.taken.add(user)
        pooled = replace(match, pool=user, output=user)
        return pooled if match.activated is not None else self.with_activation(pooled)

    # ---- what is in no match ----

    def decline_users(self, source: Node, match: Match | None = None) -> None:
        """Record why no user of ``source`` is in the ``match`` whose output it is, or in any if there is no match."""
        for user in source.users:
            if is_product(user) and user in self.declined:
                self.declined[user] = replace(self.declined[user], follows=True)
            elif is_any_batch_norm(user) or activation(user) is not None or is_call(user, aten.add.Tensor):
                self.decline(user, why_not_next(user, source, match), source, follows=True)

    def decline_rest(self) -> None:
        """Decline nodes that follow no match, naming what they follow instead."""
        for node in self.order:
            if node not in self.declined and (is_any_batch_norm(node) or activation(node) is not None):
                operands = [each for each in node.all_input_nodes if value(each) is not None and each.op != "get_attr"]
                source = operands[0] if operands else None
                self.decline(node, _what_it_follows(source), source)

    def decline(self, node: Node, reason: str, source: Node | None = None, follows: bool = False) -> None:
        """Decline a node. ``reason``: why it cannot join what comes before it. A batch norm could also go elsewhere."""
        by = skipped_by(node, self.skip) or (source and skipped_by(source, self.skip))
        if by:
            reason = f"skipped, by {by!r}"
        elif is_any_batch_norm(node):
            reason = self.why_norm_stays(node, reason)
        self.declined[node] = Declined(node, reason, follows, by is not None)


def find(settled: Settled, skip: Sequence[str] = ()) -> Found:
    """Find what can be fused in a program of constant weights, for inference, and what cannot."""
    return _Folding(settled, skip).find()


class _Folding(Finder):
    """Batch norms and constants that scale or shift channels become part of the weights before or after them."""

    def __init__(self, settled: Settled, skip: Sequence[str]) -> None:
        super().__init__(settled.program.graph, skip)
        self.settled, self.program = settled, settled.program

    def why_no_product(self, found: Product) -> str | None:
        return why_no_product(self.program, found)

    def with_norms(self, match: Match) -> Match:
        return self.with_input(self.with_zeros(self.with_affine(match)))

    def may_stand_alone(self, norm: Node) -> bool:
        return has_kernel(self.program, norm)

    def why_norm_stays(self, norm: Node, reason: str) -> str:
        return why_not_foldable(self.program, norm) or self.settled.why_there(norm, reason)

    def inside_branches(self) -> Iterator[Declined]:
        return _inside_branches(self.program)

    def with_affine(self, match: Match) -> Match:
        """Add all batch norms and constants that scale or shift the product's output."""
        while match.own_product.has_channels:
            user = sole_user(match.output)
            if not self.may_take(user):
                break
            step = as_affine(self.program, user, match.output)
            if step is None:
                break
            self.taken.add(user)
            match = replace(match, after=(*match.after, step), output=user)
        return match

    def with_input(self, match: Match) -> Match:
        """Add batch norms and constants that scale or shift the input, if it is not padded with zeros."""
        product = match.own_product
        while product.has_channels and not product.padded and not product.transposed:
            step = self._input_step(match.input, match.before[0].node if match.before else match.core)
            if step is None:
                break
            self.taken.add(step.node)
            match = replace(match, before=(step, *match.before))
        return match

    def _input_step(self, node: Node, user: Node) -> Affine | None:
        # Only where the input is the first operand, so that Match.input finds it.
        if not is_call(node) or not self.may_take(node) or sole_user(node) is not user:
            return None
        if not node.args or not isinstance(node.args[0], Node) or user.all_input_nodes.count(node) != 1:
            return None
        return as_affine(self.program, node, node.args[0])


def _what_it_follows(source: Node | None) -> str:
    if source is None or source.op == "placeholder":
        return "follows the model's input"
    return f"follows {operation(source)}, {title(source)}: no convolution or linear layer"


def _inside_branches(program: Program) -> Iterator[Declined]:
    for node in in_branches(program):
        if is_any_batch_norm(node):
            yield Declined(node, "inside a branch of control flow")


def require_account(evaluated: Program, program: Program, found: Found) -> None:
    """FusionError unless each batch norm of ``evaluated``, which became ``program``, is in a group or declined."""
    accounted = {node for match in found.matches if match.fuses for node in match.nodes}
    accounted |= {each.node for each in found.declined}
    known = [*program.graph.nodes, *in_branches(program)]
    silent = {node.meta.get(PART_OF, node.name) for node in known if is_any_batch_norm(node) and node not in accounted}
    kept = {node.meta.get(PART_OF, node.name) for node in known}
    lost = {node.name for node in evaluated.graph.nodes if is_any_batch_norm(node)} - kept
    if silent or lost:
        names = ", ".join(sorted(silent | lost))
        raise FusionError(f"of the batch norms {names} nothing can be said: they are neither fused nor left")
