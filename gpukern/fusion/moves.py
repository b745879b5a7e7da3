"""Channel tracking through operators that move elements, or average within a channel.

The operators are run on tensors that hold channel numbers in place of values. So one rule covers everything: a
concatenation, a transposition of five dimensions, half of a tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from gpukern.fusion.program import arguments, aten, first_operand, is_call, tensor_of, value, value_of_any

#: Elements of the result are elements of the operands.
MOVES = frozenset(
    (
        aten.cat.default, aten.stack.default, aten.reshape.default, aten.permute.default, aten.transpose.int,
        aten.t.default, aten.movedim.int, aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.default,
        aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.expand.default, aten.repeat.default,
        aten.slice.Tensor, aten.select.int, aten.narrow.default, aten.split.Tensor, aten.split_with_sizes.default,
        aten.chunk.default, aten.unbind.int, aten.flip.default, aten.roll.default, aten.channel_shuffle.default,
        aten.pixel_shuffle.default, aten.pixel_unshuffle.default, operator.getitem,
    )
)  # fmt: skip
#: Each pixel of the result is a mean of pixels of the same channel, its weights adding up to 1.
_RESIZED = frozenset(
    (
        aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default,
        aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec,
        aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec, aten.upsample_trilinear3d.vec,
        aten.upsample_bicubic2d.vec,
    )
)  # fmt: skip
_AVERAGES = frozenset((aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default))

#: Stands for a channel that is not tracked.
FOREIGN = -1.0


def is_move(node: Any) -> bool:
    return is_call(node) and node.target in MOVES


def carries(node: Any) -> bool:
    """Whether a constant scale and shift of each channel may as well come before ``node`` as after it."""
    return is_move(node) or _averages(node)


def _averages(node: Any) -> bool:
    if not is_call(node):
        return False
    if node.target in _AVERAGES:
        given = arguments(node)
        # Zeros around the image would count among the averaged.
        padded = any(given["padding"]) and given["count_include_pad"]
        return not padded and given.get("divisor_override") is None
    return node.target in _RESIZED or node.target is aten.mean.dim


@dataclass
class Flow:
    """``labels``: for each node that channels reach, their numbers in place of its values; ``sinks``: (node, operand)
    of all other operators that take them from there, the model's output among them."""

    labels: dict[Node, Any]
    sinks: list[tuple[Node, Node]] = field(default_factory=list)


def numbered(node: Node, dim: int, first: int, batch: int) -> torch.Tensor:
    """Fill ``node``'s shape at a batch size with the channel numbers ``first``, ``first`` + 1, ... along ``dim``."""
    shape = _sizes(tensor_of(node).shape, batch)
    channels = torch.arange(first, first + shape[dim], dtype=torch.float32)
    return channels.view([-1 if d == dim % len(shape) else 1 for d in range(len(shape))]).expand(shape)


def flow(graph: Graph, starts: Mapping[Node, torch.Tensor], batch: int, through: Callable[[Node], bool]) -> Flow:
    """Track the channels of ``starts`` through operators that are ``through``, at a batch size."""
    found = Flow(dict(starts))
    for node in graph.nodes:
        taken = [each for each in node.all_input_nodes if each in found.labels]
        if not taken:
            continue
        labels = _run(node, found.labels, batch) if through(node) and node not in starts else None
        if labels is not None:
            found.labels[node] = labels
        elif node.op == "output" or value_of_any(node) is not None:  # otherwise only its size is read
            found.sinks += [(node, each) for each in taken]
    return found


def _run(node: Node, labels: Mapping[Node, Any], batch: int) -> Any:
    """Run a node on channel numbers; None if that is not possible."""

    def operand(each: Node) -> Any:
        if each in labels:
            return labels[each]
        held = value(each)
        if held is None:
            return _size(each.meta["val"], batch)
        return torch.full(_sizes(held.shape, batch), FOREIGN)

    target: Any = node.target
    try:
        if is_move(node):
            return target(*torch.fx.map_arg(node.args, operand), **torch.fx.map_arg(node.kwargs, operand))
        return _averaged(node, labels[first_operand(node)], batch)
    except (RuntimeError, IndexError, KeyError, TypeError, ValueError):
        return None


def _averaged(node: Node, labels: torch.Tensor, batch: int) -> torch.Tensor | None:
    """A mean is of one channel only if all its elements bear one number."""
    if node.target is aten.mean.dim:
        dims = arguments(node)["dim"]
        keep = arguments(node)["keepdim"]
        same = torch.equal(labels.amin(dims, keepdim=keep), labels.amax(dims, keepdim=keep))
        return labels.amax(dims, keepdim=keep) if dims and same else None
    window = tensor_of(node).dim() - 2
    if window < 1:
        return None
    pixels = labels.flatten(-window)
    if not torch.equal(pixels.amin(-1), pixels.amax(-1)):
        return None
    return pixels[..., 0].view(*pixels.shape[:-1], *[1] * window).expand(_sizes(tensor_of(node).shape, batch))


def _sizes(shape: Any, batch: int) -> list[int]:
    return [_size(size, batch) for size in shape]


def _size(size: Any, batch: int) -> int:
    """A size that depends on the batch's, in numbers."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))
    return size
