"""Batch norms and activations that only moves part from their layer, put beside it.

    bn(cat([a ∗ x, b ∗ y])) = cat([bn₁(a ∗ x), bn₂(b ∗ y)]),   relu(reshape(x w)) = reshape(relu(x w)),
    flatten(bn(x)) w = bn'(flatten(x)) w

The program computes the same in exact arithmetic, and matching finds the pairs it supports. ``is_move`` decides what is
a move; averages of a channel's pixels are as good for a batch norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.fx import Node

from gpukern.fusion.affine import Affine, as_affine, is_batch_norm
from gpukern.fusion.conditions import skipped_by, why_no_product
from gpukern.fusion.moves import FOREIGN, Flow, carries, flow, is_move, numbered
from gpukern.fusion.moving import Place, move_after, move_before
from gpukern.fusion.products import Product, activation, is_product, product
from gpukern.fusion.program import (
    Program,
    first_operand,
    is_call,
    operation,
    sole_user,
    tensor_of,
    title,
    value,
    value_of_any,
)

_Found = TypeVar("_Found", list[Place], torch.Tensor)
#: Batch sizes at which channels are followed: where they get to must not depend on it.
_BATCHES = (2, 3)


@dataclass(frozen=True)
class Settled:
    """``program`` with all beside its layer that a layer can take. ``before`` and ``after``: of nodes that stayed, why
    no layer before or after them could take what they scale and shift."""

    program: Program
    before: dict[Node, str] = field(default_factory=dict)
    after: dict[Node, str] = field(default_factory=dict)

    def why_there(self, node: Node, why_not_fused: str) -> str:
        """Why a batch norm is where it is, ``why_not_fused`` with what comes right before it."""
        return "; ".join(filter(None, (self.before.get(node, why_not_fused), self.after.get(node))))


def settle(program: Program, skip: Sequence[str] = ()) -> Settled:
    """Move what a layer can take beside it."""
    graph, _ = program.copy()
    settled = Settled(program.with_graph(graph, dict(program.constants)))
    for node in [each for each in graph.nodes if is_call(each)]:
        places = _of_activation(settled.program, node, skip) or _upward(settled.program, node, skip)
        if isinstance(places, list):
            move_after(settled.program, node, places)
        elif places:
            settled.before[node] = places
    for node in [each for each in reversed(graph.nodes) if is_call(each)]:
        places = _downward(settled.program, node, skip)
        if isinstance(places, list):
            move_before(settled.program, node, places)
        elif places:
            settled.after[node] = places
    graph.lint()
    return settled


# ---- to the layer before ---------------------------------------------------------------------------------------------


def _upward(program: Program, node: Node, skip: Sequence[str]) -> list[Place] | str | None:
    """The layers that can take over what ``node`` scales and shifts; why not, if moves are all that is between them.

    None for other nodes, and for those that follow no move.
    """
    step, through = _affine(program, node), _through(node)
    if step is None or not through(first_operand(node)) or skipped_by(node, skip):
        return None
    sources, _ = _cone(first_operand(node), through)
    why = next(filter(None, (_why_no_layer(program, source, skip) for source in sources)), None)
    if why:
        return f"follows {operation(first_operand(node))} of {why}"
    homes = _same_for_all(node, lambda batch: _homes(program, node, sources, batch))
    if isinstance(homes, str):
        return homes
    return [Place(source, home) for source, home in zip(sources, homes.split(_channels(sources)), strict=True)]


def _homes(program: Program, node: Node, sources: Sequence[Node], batch: int) -> torch.Tensor | str:
    """Return for each channel of all ``sources`` which channel of ``node`` it becomes, FOREIGN if none."""
    starts, first = {}, 0
    for source, count in zip(sources, _channels(sources), strict=True):
        starts[source] = numbered(source, _channel_dim(source), first, batch)
        first += count
    found = flow(program.graph, starts, batch, _through(node))
    names = ", ".join(map(title, sources))
    arrived = found.labels.get(first_operand(node))
    if not isinstance(arrived, torch.Tensor):
        return f"what {names} computes is moved in a way that is not followed"
    arrived = arrived.movedim(1, 0).flatten(1).long()
    reached = torch.zeros(first, len(arrived), dtype=torch.bool)
    reached[arrived, torch.arange(len(arrived))[:, None]] = True
    if (reached.sum(1) > 1).any():
        return f"normalises other channels than those of {names}: each gets to more than one"
    home = torch.where(reached.any(1), reached.int().argmax(1), int(FOREIGN))
    others = _other_users(found, node, home != FOREIGN)
    return f"the result of {names} has other users: {', '.join(others)}" if others else home


def _other_users(found: Flow, node: Node, wanted: torch.Tensor) -> list[str]:
    """Return all users but ``node`` that take any of the ``wanted`` channels."""
    others: dict[str, None] = {}
    for user, operand in found.sinks:
        held = found.labels[operand]
        numbers = torch.cat([each.unique() for each in ([held] if isinstance(held, torch.Tensor) else held)])
        if user is not node and wanted[numbers[numbers != FOREIGN].long()].any():
            others["the model's output" if user.op == "output" else title(user)] = None
    return list(others)


def _why_no_layer(program: Program, source: Node, skip: Sequence[str]) -> str | None:
    if source.op == "placeholder":
        return f"the model's input {source.name}"
    layer = _layer(program, source)
    if layer is None and is_product(source):
        return f"{operation(source)}, {title(source)}, which was left as it is"
    if layer is None:
        return f"{operation(source)}, {title(source)}: no convolution or linear layer"
    by = skipped_by(layer.node, skip)
    return f"{title(layer.node)}, which is skipped, by {by!r}" if by else None


def _layer(program: Program, node: Node) -> Product | None:
    """The layer whose result ``node`` is, scaled and shifted by constants at most."""
    found = node
    while is_call(found) and not is_product(found):
        if _affine(program, found) is None or sole_user(first_operand(found)) is not found:
            return None
        found = first_operand(found)
    layer = product(found) if is_product(found) else None
    if layer is None or why_no_product(program, layer):
        return None
    return layer if found is node or layer.has_channels else None


def _of_activation(program: Program, node: Node, skip: Sequence[str]) -> list[Place] | None:
    """The layers that can compute an activation of all that they make, which only moves part from it."""
    if activation(node) is None or not node.args or not is_move(node.args[0]) or skipped_by(node, skip):
        return None
    sources, between = _cone(first_operand(node), is_move)
    layers = [None if _why_no_layer(program, source, skip) else _layer(program, source) for source in sources]
    if not all(layer is not None and layer.takes_activation for layer in layers):
        return None
    inside = {*between, node}
    users = [user for each in (*sources, *between) for user in each.users if user not in inside]
    if any(user.op == "output" or value_of_any(user) is not None for user in users):
        return None
    return [Place(source, None) for source in sources]


# ---- to the layer after ----------------------------------------------------------------------------------------------


def _downward(program: Program, node: Node, skip: Sequence[str]) -> list[Place] | str | None:
    """The layers whose inputs can be scaled and shifted instead of ``node``'s; why not, if it only could be so folded.

    None for other nodes, and for those that are beside a layer already.
    """
    step = _affine(program, node)
    if step is None or skipped_by(node, skip):
        return None
    operand = first_operand(node)
    if sole_user(operand) is node and _layer(program, operand) is not None:
        return None
    places = _same_for_all(node, lambda batch: _takers(program, step, batch, skip))
    if isinstance(places, list) and places[0].node is sole_user(node) and product(places[0].node).has_channels:
        return None
    return places


def _takers(program: Program, step: Affine, batch: int, skip: Sequence[str]) -> list[Place] | str:
    found = flow(program.graph, {step.node: numbered(step.node, 1, 0, batch)}, batch, _through(step.node))
    places = []
    for user, operand in found.sinks:
        why = _why_not_into(program, user, operand, skip)
        if why:
            return why
        rows = found.labels[operand].movedim(-1 if product(user).kind == "linear" else 1, 0).flatten(1)
        if not torch.equal(rows.amin(1), rows.amax(1)):
            return f"each input of {title(user)} after it is of more than one of its channels"
        places.append(Place(user, rows[:, 0].long()))
    return places or "nothing takes it"


def _why_not_into(program: Program, user: Node, operand: Node, skip: Sequence[str]) -> str | None:
    """Return the reason why a layer cannot absorb a scale and shift of its input."""
    if user.op == "output":
        return "is an output of the model"
    if not is_product(user):
        return f"{operation(user)}, {title(user)}, follows"
    found, named = product(user), f"{title(user)} after it"
    by = skipped_by(user, skip)
    if by:
        return f"{named} is skipped, by {by!r}"
    if found.transposed:
        return f"{named} is transposed"
    if found.padded:
        return f"{named} pads it with zeros, which are not shifted"
    once = user.all_input_nodes.count(operand) == 1 and found.input is operand
    return None if once and not why_no_product(program, found) else f"{named} has no constant weights"


# ---- both ways -------------------------------------------------------------------------------------------------------


def _affine(program: Program, node: Node) -> Affine | None:
    """Return the affine map of a call on the channels of its first operand."""
    first = node.args[0] if node.args else None
    if not isinstance(first, Node) or node.all_input_nodes.count(first) != 1:
        return None
    return as_affine(program, node, first)


def _through(node: Node) -> Callable[[Node], bool]:
    """Return the operators through which ``node`` may move: plain arithmetic stays with the pools beside it."""
    return carries if is_batch_norm(node) else is_move


def _same_for_all(node: Node, at: Callable[[int], _Found | str]) -> _Found | str:
    """Return the result of ``at`` that is the same for every batch size."""
    free = any(isinstance(size, torch.SymInt) for size in tensor_of(node).shape)
    found = [at(batch) for batch in (_BATCHES if free else _BATCHES[:1])]
    why = next((each for each in found if isinstance(each, str)), None)
    if why:
        return why
    plain = [_all_channels(each) for each in found]
    same = all(torch.equal(a, b) for other in plain[1:] for a, b in zip(plain[0], other, strict=True))
    return found[0] if same else "the moves between it and a layer depend on the batch size"


def _all_channels(found: Any) -> list[Any]:
    return [found] if isinstance(found, torch.Tensor) else [place.channels for place in found]


def _cone(node: Node, through: Callable[[Node], bool]) -> tuple[list[Node], list[Node]]:
    """Return the inputs of ``node`` and of the operators before it that are ``through`` like it; and these."""
    sources: dict[Node, None] = {}
    between: dict[Node, None] = {node: None}
    waiting = [node]
    while waiting:
        for each in waiting.pop().all_input_nodes:
            if through(each) and each not in between:
                between[each] = None
                waiting.append(each)
            elif not through(each) and value(each) is not None:  # else a size
                sources[each] = None
    return list(sources), list(between)


def _channel_dim(source: Node) -> int:
    return -1 if is_product(source) and product(source).kind == "linear" else 1


def _channels(sources: Sequence[Node]) -> list[int]:
    return [int(tensor_of(source).shape[_channel_dim(source)]) for source in sources]
