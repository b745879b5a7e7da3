"""Launches of a fused network, operator by operator, and their bounds: parts of ``gpukern explain``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from gpukern.explain.layers import Kind, Pool
from gpukern.explain.network import Part, Place, Setting, by_bytes, launch, pool
from gpukern.fusion.capture import quiet
from gpukern.fusion.prediction import question_of
from gpukern.fusion.program import arguments, is_call, is_view, operation, tensor_of
from gpukern.ops._pool2d.cost_model import Pooling
from gpukern.ops._pool2d.problem import AdaptiveProblem, PoolProblem, adaptive_problem, pool_problem
from gpukern.runtime.eight_bits import in_8_bits


def fused_parts(module: torch.nn.Module, image: torch.Tensor, setting: Setting) -> list[Part]:
    """Every operator of ``module(image)`` but views; batch norms are in the convolutions by now.

    ``module`` is a :attr:`FusedModel.module`; it and ``image`` may be on the meta device, as nothing is computed. A
    convolution and its max pool count as two launches, which they are where one would not be faster; whatever is
    neither a product nor a pool counts by its bytes.
    """
    every = [part for node in launching(module, image) for part in _parts(node, setting)]
    # Equal except for their names: listed once, with a count.
    alike: dict[Part, list[str]] = {}
    for part in every:
        alike.setdefault(dataclasses.replace(part, layer=""), []).append(part.layer)
    return [dataclasses.replace(part, layer=names[0], count=len(names)) for part, names in alike.items()]


def launching(module: torch.nn.Module, image: torch.Tensor) -> list[Node]:
    """Return the operators of a pass, in order, as torch.export captures them, without views."""
    with quiet():
        graph = torch.export.export(module, (image,)).graph
    return [node for node in graph.nodes if is_call(node) and not is_view(node)]


def _parts(node: Node, setting: Setting) -> Iterator[Part]:
    asked = question_of(node, setting.device, setting.channels_last)
    if asked is not None:
        name = operation(node).removesuffix("_max_pool2d")
        part = launch(node.name, 1, name, asked, setting.compiles)
        epilogue = [asked.epilogue.activation, "residual" * asked.epilogue.residual]
        with_epilogue = ", ".join([part.problem, *(word for word in epilogue if word not in ("", "none"))])
        yield dataclasses.replace(part, problem=with_epilogue)
    target: Any = node.target
    pooled = _POOLS.get(operation(node)) if target.namespace == "gpukern" else None
    if pooled is not None and not in_8_bits(tensor_of(node).dtype):  # the setting has one dtype for all
        kind, problem_of = pooled
        pooling = Pooling.MAX if kind is Kind.MAX else Pooling.AVG
        yield pool(node.name, 1, Pool(kind, problem_of(node)), pooling, setting)
    elif asked is None:
        moved = sum(tensor.nbytes for each in (node, *node.all_input_nodes) for tensor in _tensors(each))
        sizes = "×".join(map(str, _tensors(node)[0].shape))
        yield by_bytes(Place(node.name, 1, operation(node), "forward", sizes), moved, setting)


def _tensors(node: Node) -> list[torch.Tensor]:
    """One, or those of a tuple, without data."""
    return [each for each in tree_leaves(node.meta.get("val")) if isinstance(each, torch.Tensor)]


# ---- pools ---------------------------------------------------------------------------------------------------------


def _max_pool(node: Node) -> PoolProblem:
    given = arguments(node)
    return pool_problem(_shape(given["input"]), *_window(node), given["ceil_mode"])


def _max_pool_after(node: Node) -> PoolProblem:
    """The pool in the same operator as a convolution: 2×2, with a stride of 2."""
    n, k, p, q = _shape(node)
    return pool_problem((n, k, 2 * p, 2 * q), (2, 2), (2, 2), (0, 0), (1, 1), False)


def _avg_pool(node: Node) -> PoolProblem:
    given = arguments(node)
    rest = given["ceil_mode"], given["count_include_pad"], given["divisor_override"]
    return pool_problem(_shape(given["input"]), *_window(node), *rest)


def _adaptive_pool(node: Node) -> AdaptiveProblem:
    return adaptive_problem(_shape(arguments(node)["input"]), _shape(node)[2:])


def _window(node: Node) -> tuple[tuple[int, int], ...]:
    given = arguments(node)
    return tuple(tuple(given[name]) for name in ("kernel", "stride", "padding", "dilation"))


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(tensor_of(node).shape)


_POOLS: dict[str, tuple[Kind, Callable[[Node], PoolProblem | AdaptiveProblem]]] = {
    "max_pool2d": (Kind.MAX, _max_pool),
    "conv2d_max_pool2d": (Kind.MAX, _max_pool_after),
    "avg_pool2d": (Kind.AVERAGE, _avg_pool),
    "adaptive_avg_pool2d": (Kind.ADAPTIVE, _adaptive_pool),
}
