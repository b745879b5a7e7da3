"""Moves of a batch norm, constant arithmetic or an activation from its place in a graph to layers."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from gpukern.fusion.affine import as_affine, is_batch_norm
from gpukern.fusion.constants import constant
from gpukern.fusion.moves import FOREIGN
from gpukern.fusion.program import Program, arguments, aten, first_operand, tensor_of, value

#: Under it a part bears the name of what it is a part of, in ``Node.meta``.
PART_OF = "gpukern_part_of"


@dataclass(frozen=True)
class Place:
    """``node``, after which or, as the input of a layer, before which a part goes.

    ``channels[k]`` is the moved node's channel for channel ``k`` there, FOREIGN for one that stays as it is; None for
    an activation, which is the same for all.
    """

    node: Node
    channels: torch.Tensor | None


def move_after(program: Program, node: Node, places: Sequence[Place]) -> None:
    """Each place's result goes through a part of ``node``, in place of ``node``; ``program`` is changed."""
    graph = program.graph
    for place in places:
        source = place.node
        if place.channels is not None:
            source = _as_rows(graph, source)
        with graph.inserting_before(source.next):
            part = _part(program, node, source, place.channels)
        source.replace_all_uses_with(part, delete_user_cb=functools.partial(operator.is_not, part))
    _remove(graph, node)


def move_before(program: Program, node: Node, places: Sequence[Place]) -> None:
    """Each place's layer takes its input through a part of ``node``, in place of ``node``; ``program`` is changed."""
    graph = program.graph
    for place in places:
        layer = _as_rows(graph, place.node)
        with graph.inserting_before(layer):
            part = _part(program, node, first_operand(layer), place.channels)
        layer.update_arg(0, part)
    _remove(graph, node)


def _remove(graph: Graph, node: Node) -> None:
    node.replace_all_uses_with(first_operand(node))
    graph.erase_node(node)


def _as_rows(graph: Graph, layer: Node) -> Node:
    """A linear layer over more than rows as one over rows, between reshapes; all else as it is."""
    if layer.target is not aten.linear.default or tensor_of(layer).dim() == 2:
        return layer
    input, (*leading, features) = layer.args[0], tensor_of(layer).shape
    with graph.inserting_before(layer):
        sizes = [
            size if isinstance(size, int) else _call(graph, aten.sym_size.int, (input, dim), {"val": size})
            for dim, size in enumerate(leading)
        ]
        count = math.prod(leading)
        flat = {"val": tensor_of(input).new_empty((count, tensor_of(input).shape[-1]))}
        rows = _call(graph, aten.reshape.default, (input, [-1, tensor_of(input).shape[-1]]), flat)
        made = {**layer.meta, "val": tensor_of(layer).new_empty((count, features))}
        over_rows = _call(graph, layer.target, (rows, *layer.args[1:]), made)
        back = _call(graph, aten.reshape.default, (over_rows, [*sizes, features]), {"val": value(layer)})
    layer.replace_all_uses_with(back)
    graph.erase_node(layer)
    return over_rows


def _part(program: Program, node: Node, input: Node, channels: torch.Tensor | None) -> Node:
    """Apply the operation of ``node`` to ``input``."""
    graph = program.graph
    meta = {**node.meta, "val": value(input), PART_OF: node.meta.get(PART_OF, node.name)}
    if channels is None:
        part = graph.node_copy(node, lambda each: input if each is node.args[0] else each)
        part.meta = meta
        return part
    if is_batch_norm(node):
        return _batch_norm(program, node, input, channels, meta)
    step = as_affine(program, node, first_operand(node))
    assert step is not None, "only batch norms, activations and what scales or shifts are moved"
    scales = step.name == "scale"
    factor = _picked(step.scale if scales else step.shift, channels, 1.0 if scales else 0.0)
    held = _held(program, node, factor.view(-1, *[1] * (tensor_of(input).dim() - 2)))
    return _call(graph, aten.mul.Tensor if scales else aten.add.Tensor, (input, held), meta)


def _batch_norm(program: Program, node: Node, input: Node, channels: torch.Tensor, meta: dict) -> Node:
    given = arguments(node)
    # (x - 0) / √(1 + eps) · √(1 + eps) + 0
    neutral = {"weight": math.sqrt(1 + given["eps"]), "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
    absent = {"weight": 1.0, "bias": 0.0}
    operands: list[Node | None] = []
    for name, untouched in neutral.items():
        if given[name] is None and not (channels == FOREIGN).any():
            operands.append(None)
            continue
        held = constant(program, given[name])
        if held is None:
            held = torch.full((int(tensor_of(node).shape[1]),), absent[name], device=tensor_of(input).device)
        operands.append(_held(program, node, _picked(held.double(), channels, untouched)))
    args = (input, *operands, False, given["momentum"], given["eps"], given["cudnn_enabled"])
    return _call(program.graph, aten.batch_norm.default, args, meta)


def _picked(of_channel: torch.Tensor, channels: torch.Tensor, untouched: float) -> torch.Tensor:
    channels = channels.to(of_channel.device)
    return torch.where(channels == FOREIGN, untouched, of_channel[channels.clamp(min=0)])


def _held(program: Program, node: Node, tensor: torch.Tensor) -> Node:
    """A new constant of ``program``, rounded later to the dtype of what ``node`` computes."""
    name = f"_part_{len(program.constants)}"
    program.constants[name] = tensor
    held = program.graph.create_node("get_attr", name, name=name)
    held.meta["val"] = torch.empty(tensor.shape, dtype=tensor_of(node).dtype, device="meta")
    return held


def _call(graph: Graph, target, args: tuple, meta: dict) -> Node:
    node = graph.call_function(target, args)
    node.meta = meta
    return node
