"""Which nodes of a program become one: a walk that follows each product, and each batch norm that follows none."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from gpukern.fusion.affine import Affine, affine, foldable, is_batch_norm
from gpukern.fusion.constants import constant
from gpukern.fusion.products import (
    MONOTONE,
    Product,
    activation,
    is_epilogue_pool,
    is_product,
    product,
    zeros_around,
)
from gpukern.fusion.program import Program, arguments, aten, is_call, module_path, sole_user, value
from gpukern.runtime.tensors import KERNEL_DTYPES


@dataclass(frozen=True)
class Match:
    """Nodes that one operator will compute: [affine] → ``core`` → affine → + ``residual`` → ``activation`` → ``pool``.

    Zeros that ``zeros`` puts around the input are the core's. A monotone activation may also come after the pool.
    ``core`` is a product or, where ``product`` is None, a batch norm that nothing absorbs. ``output`` is the last node,
    whose value the operator computes. A match of the core alone changes who computes it, and fuses nothing.
    """

    core: Node
    output: Node
    product: Product | None = None
    before: tuple[Affine, ...] = ()
    after: tuple[Affine, ...] = ()
    add: Node | None = None
    residual: Node | None = None
    activation: tuple[str, float] = ("none", 0.0)
    activated: Node | None = None
    zeros: Node | None = None
    pool: Node | None = None

    @property
    def nodes(self) -> tuple[Node, ...]:
        """In the order of the computation."""
        before, after = ([step.node for step in steps] for steps in (self.before, self.after))
        last = (self.pool, self.activated) if self.output is self.activated else (self.activated, self.pool)
        found = (*before, self.zeros, self.core, *after, self.add, *last)
        return tuple(node for node in found if node is not None)

    @property
    def fuses(self) -> bool:
        return len(self.nodes) > 1

    @property
    def operator(self) -> str:
        if self.pool is not None:
            return "gpukern::conv2d_max_pool2d"
        return "gpukern::batch_norm" if self.product is None else self.product.operator

    @property
    def pattern(self) -> str:
        core = "batch_norm" if self.product is None else self.product.kind
        words = {step.node: step.name for step in (*self.before, *self.after)}
        words |= {self.zeros: "pad", self.core: core, self.add: "add", self.pool: "max_pool2d"}
        words[self.activated] = self.activation[0]
        return " + ".join(words[node] for node in self.nodes)

    @property
    def input(self) -> Node:
        if self.before:
            return self.before[0].node.args[0]
        return self.product.input if self.product else arguments(self.core)["input"]


def find(program: Program, skip: Sequence[str] = ()) -> list[Match]:
    """All matches, in the order of their outputs. No node is in two."""
    return _Finder(program, skip).find()


class _Finder:
    def __init__(self, program: Program, skip: Sequence[str]) -> None:
        self.program, self.skip = program, skip
        self.order = {node: number for number, node in enumerate(program.graph.nodes)}
        self.taken: set[Node] = set()

    def find(self) -> list[Match]:
        matches = [self.with_affine(product(node)) for node in self.products()]
        matches = [self.with_input(self.with_zeros(match)) for match in matches]
        matches += [Match(node, node) for node in self.free_batch_norms()]
        # Of two that meet in an addition the later takes it: the other's result is there by then.
        matches.sort(key=lambda match: self.order[match.output], reverse=True)
        matches = [self.with_pool(self.with_activation(self.with_residual(match))) for match in matches]
        return sorted(matches, key=lambda match: self.order[match.output])

    def products(self) -> Iterator[Node]:
        for node in self.order:
            if is_product(node) and self.may_take(node) and understood(self.program, product(node)):
                self.taken.add(node)
                yield node

    def free_batch_norms(self) -> Iterator[Node]:
        for node in self.order:
            if is_batch_norm(node) and self.may_take(node) and _has_kernel(self.program, node):
                self.taken.add(node)
                yield node

    def may_take(self, node: Node | None) -> bool:
        return node is not None and node not in self.taken and skipped_by(node, self.skip) is None

    def with_affine(self, match_of: Product) -> Match:
        """All batch norms and constants that scale or shift what the product computes."""
        match = Match(match_of.node, match_of.node, match_of)
        while match_of.has_channels:
            user = sole_user(match.output)
            step = affine(self.program, user, match.output) if self.may_take(user) else None
            if step is None:
                break
            self.taken.add(user)
            match = replace(match, after=(*match.after, step), output=user)
        return match

    def with_zeros(self, match: Match) -> Match:
        """Zeros that a node of its own puts around the input: the convolution's own padding from now on."""
        node = match.product.input
        if not match.product.is_of_images or not self.may_take(node) or sole_user(node) is not match.core:
            return match
        zeros = zeros_around(node)
        if zeros is None:
            return match
        self.taken.add(node)
        return replace(match, zeros=node, product=replace(match.product, input=node.args[0], zeros=zeros))

    def with_input(self, match: Match) -> Match:
        """The same of what goes into it, if no zeros are put around that."""
        while match.product.has_channels and not match.product.padded and not match.product.transposed:
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
        return affine(self.program, node, node.args[0])

    def with_residual(self, match: Match) -> Match:
        user = sole_user(match.output)
        takes = match.product is None or match.product.takes_residual
        if not takes or not self.may_take(user) or why_no_residual(user, match.output) is not None:
            return match
        self.taken.add(user)
        return replace(match, add=user, residual=other_operand(user, match.output), output=user)

    def with_activation(self, match: Match) -> Match:
        user = sole_user(match.output)
        takes = match.product is None or match.product.takes_activation
        found = activation(user) if takes and self.may_take(user) else None
        if found is None or (match.pool is not None and found[0] not in MONOTONE):
            return match
        self.taken.add(user)
        return replace(match, activation=found, activated=user, output=user)

    def with_pool(self, match: Match) -> Match:
        """A max pool, and a monotone activation after it if there was none before."""
        user = sole_user(match.output)
        takes = match.product is not None and match.product.is_of_images and match.add is None
        if not takes or not self.may_take(user) or not is_epilogue_pool(user):
            return match
        self.taken.add(user)
        pooled = replace(match, pool=user, output=user)
        return pooled if match.activated is not None else self.with_activation(pooled)


# ---- conditions -----------------------------------------------------------------------------------------------------


def skipped_by(node: Node, skip: Sequence[str]) -> str | None:
    """The pattern that names the module of ``node``, or one around it."""
    parts = module_path(node).split(".")
    paths = [".".join(parts[: number + 1]) for number in range(len(parts))]
    return next((pattern for pattern in skip if any(fnmatch.fnmatchcase(path, pattern) for path in paths)), None)


def understood(program: Program, found: Product) -> bool:
    """Whether a product's weight and bias are constants, and its numbers real."""
    output = value(found.node)
    if output is None or not output.is_floating_point() or constant(program, found.weight) is None:
        return False
    unbatched = found.kind != "linear" and not found.has_channels
    return not unbatched and (found.bias is None or constant(program, found.bias) is not None)


def _has_kernel(program: Program, node: Node) -> bool:
    """Whether gpukern::batch_norm can compute what is left of a batch norm."""
    input = value(arguments(node)["input"])
    return foldable(program, node) and input.dim() in (2, 3, 4) and input.dtype in KERNEL_DTYPES


def other_operand(add: Node, one: Node) -> Node | None:
    first, second = add.args[:2]
    other = second if first is one else first
    return other if isinstance(other, Node) and other is not one else None


def why_no_residual(add: Node, one: Node) -> str | None:
    """What keeps an epilogue from computing ``one + other``; None if nothing does."""
    if not is_call(add, aten.add.Tensor):
        return "not an addition of tensors"
    other = other_operand(add, one)
    if other is None or value(other) is None:
        return "not an addition of two different tensors"
    alpha = arguments(add)["alpha"]
    if alpha != 1:
        return f"alpha = {alpha}"
    mine, theirs = value(one), value(other)
    if tuple(mine.shape) != tuple(theirs.shape):
        return "broadcasts"
    if mine.dtype != theirs.dtype or value(add).dtype != mine.dtype:
        return "adds tensors of different dtypes"
    return None
