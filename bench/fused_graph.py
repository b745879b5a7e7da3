"""What a network that gpukern.fuse made launches, operator by operator, and what its plans cannot beat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch.fx import Node

from bench.predict import predict_convolution, prediction, total
from bench.results import Prediction
from bench.suite import Task
from bench.suites.linear import Linear
from bench.suites.pool import Kind, Pool, Pools
from gpukern.conv import Direction, conv_problem
from gpukern.explain.query import Epilogue
from gpukern.fusion.capture import quiet
from gpukern.fusion.program import arguments, is_call, is_view, operation, value
from gpukern.ops._pool2d.problem import adaptive_problem, pool_problem
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.roofline import Cost, Work


def predict_fused(task: Task, module: torch.nn.Module, image: torch.Tensor, device: DeviceSpec) -> Prediction:
    """The sum over all operators of ``module(image)``; batch norms are in the convolutions by now.

    ``module`` and ``image`` may be on the meta device: nothing is computed.
    """
    nodes = launching(module, image)
    parts = [(1, part) for node in nodes for part in _predictions(task, node, device)]
    kinds = Counter(map(operation, nodes))
    return total(task, ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()), parts)


def launching(module: torch.nn.Module, image: torch.Tensor) -> list[Node]:
    """The operators of a pass, in order, as torch.export sees them: all that is no view."""
    with quiet():
        graph = torch.export.export(module, (image,)).graph
    return [node for node in graph.nodes if is_call(node) and not is_view(node)]


def _predictions(task: Task, node: Node, device: DeviceSpec) -> Iterator[Prediction]:
    part = _PARTS.get(operation(node), _by_bytes)
    return part(task, node, device)


def _convolution(task: Task, node: Node, device: DeviceSpec) -> Iterator[Prediction]:
    given = arguments(node)
    shapes = _shape(given["input"]), _shape(given["weight"])
    geometry = (tuple(given[name]) for name in ("stride", "padding", "dilation"))
    problem = conv_problem(*shapes, None, *geometry, given["groups"])
    epilogue = Epilogue(given["activation"], residual=given.get("residual") is not None)
    yield predict_convolution(task, problem, Direction.FORWARD, device, epilogue)


def _convolution_and_pool(task: Task, node: Node, device: DeviceSpec) -> Iterator[Prediction]:
    """As two launches, which is what it is where one would not be faster."""
    (alone,) = _convolution(task, node, device)
    yield alone
    n, k, p, q = _shape(node)
    yield _pool(task, Pool(Kind.MAX, pool_problem((n, k, 2 * p, 2 * q), (2, 2), (2, 2), (0, 0), (1, 1), False)), device)


def _linear(task: Task, node: Node, device: DeviceSpec) -> Iterator[Prediction]:
    given = arguments(node)
    (rows, inputs), (outputs, _) = _shape(given["input"]), _shape(given["weight"])
    matrices, problem = (
        replace(task, case=replace(task.case, layout="")),
        Linear(rows, inputs, outputs).as_convolution(),
    )
    yield predict_convolution(matrices, problem, Direction.FORWARD, device, Epilogue(given["activation"]))


def _max_pool(task: Task, node: Node, device: DeviceSpec) -> Iterator[Prediction]:
    given = arguments(node)
    window = (tuple(given[name]) for name in ("kernel", "stride", "padding", "dilation"))
    yield _pool(task, Pool(Kind.MAX, pool_problem(_shape(given["input"]), *window, given["ceil_mode"])), device)


def _avg_pool(task: Task, node: Node, device: DeviceSpec) -> Iterator[Prediction]:
    given = arguments(node)
    window = (tuple(given[name]) for name in ("kernel", "stride", "padding", "dilation"))
    rest = given["ceil_mode"], given["count_include_pad"], given["divisor_override"]
    yield _pool(task, Pool(Kind.AVERAGE, pool_problem(_shape(given["input"]), *window, *rest)), device)


def _adaptive_pool(task: Task, node: Node, device: DeviceSpec) -> Iterator[Prediction]:
    problem = adaptive_problem(_shape(arguments(node)["input"]), _shape(node)[2:])
    yield _pool(task, Pool(Kind.ADAPTIVE, problem), device)


def _pool(task: Task, pool: Pool, device: DeviceSpec) -> Prediction:
    return Pools().predict(Task(replace(task.case, suite=Pools.name, computation="forward"), pool), device)


def _by_bytes(task: Task, node: Node, device: DeviceSpec) -> Iterator[Prediction]:
    """Whatever else there is reads its tensors and writes its result: memory bounds it."""
    moved = sum(value(each).nbytes for each in (node, *node.all_input_nodes) if value(each) is not None)
    cost = Cost(1, 0.0, 1.0, moved, 1, 0.0, moved / device.peaks.bandwidth)
    yield prediction(task, operation(node), cost, Work(0.0, moved, task.case.dtype), device)


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(value(node).shape)


_Part = Callable[[Task, Node, DeviceSpec], Iterator[Prediction]]
_PARTS: dict[str, _Part] = {
    "conv2d": _convolution,
    "conv2d_max_pool2d": _convolution_and_pool,
    "linear": _linear,
    "max_pool2d": _max_pool,
    "avg_pool2d": _avg_pool,
    "adaptive_avg_pool2d": _adaptive_pool,
}
