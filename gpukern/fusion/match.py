"""A match: nodes of a program that become one."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from gpukern.fusion.affine import Affine
from gpukern.fusion.products import Product
from gpukern.fusion.program import arguments, first_operand


@dataclass(frozen=True)
class Match:
    """Nodes that one operator will compute: [affine] → ``core`` → affine → + ``residual`` → ``activation`` → ``pool``.

    In training it is ``core`` → ``norm`` → + ``residual`` → ``activation``, with a batch norm of any statistics. Zeros
    that ``zeros`` puts around the input are the core's. A monotone activation may also come after the pool.
    ``core`` is a product or, where ``product`` is None, a batch norm that nothing absorbs. ``output`` is the last node,
    whose value the operator computes. A match of the core alone changes who computes it, and fuses nothing.
    """

    core: Node
    output: Node
    product: Product | None = None
    before: tuple[Affine, ...] = ()
    after: tuple[Affine, ...] = ()
    norm: Node | None = None
    add: Node | None = None
    residual: Node | None = None
    activation: tuple[str, float] = ("none", 0.0)
    activated: Node | None = None
    zeros: Node | None = None
    pool: Node | None = None

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes in the order of the computation."""
        before, after = ([step.node for step in steps] for steps in (self.before, self.after))
        last = (self.pool, self.activated) if self.output is self.activated else (self.activated, self.pool)
        found = (*before, self.zeros, self.core, *after, self.norm, self.add, *last)
        return tuple(node for node in found if node is not None)

    @property
    def own_product(self) -> Product:
        """``product``, of a match that is not of a batch norm."""
        assert self.product is not None
        return self.product

    @property
    def takes_residual(self) -> bool:
        return self.product is None or self.norm is not None or self.product.takes_residual

    @property
    def takes_activation(self) -> bool:
        return self.product is None or self.norm is not None or self.product.takes_activation

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
        words[self.core] = core
        optional = (
            (self.zeros, "pad"),
            (self.norm, "batch_norm"),
            (self.add, "add"),
            (self.pool, "max_pool2d"),
            (self.activated, self.activation[0]),
        )
        words |= {node: word for node, word in optional if node is not None}
        return " + ".join(words[node] for node in self.nodes)

    @property
    def input(self) -> Node:
        if self.before:
            return first_operand(self.before[0].node)
        return self.product.input if self.product else arguments(self.core)["input"]
