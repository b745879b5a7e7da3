"""Maximum and average pooling, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import gpukern.functional as F
from bench.accuracy import DTYPES, sum_bound
from bench.layers import distinct
from bench.peers import to_layout, torch_peers
from bench.results import Use
from bench.suite import Implementation, Suite, Task, Tensors, in_mode, register
from gpukern.explain.layers import Kind, Pool, describe_pool, pool_of
from gpukern.ops._pool2d.cost_model import Pooling, work
from gpukern.ops._pool2d.problem import AdaptiveProblem, PoolProblem
from gpukern.ops.pool2d import (
    adaptive_avg_pool2d_backward,
    avg_pool2d_backward,
    max_pool2d_backward,
    max_pool2d_with_taps,
)
from gpukern.runtime.integers import cdiv
from gpukern.runtime.roofline import Work

FORWARD, FOR_TRAINING, BACKWARD = "forward", "forward for training", "backward"


def geometry_of(pool: Pool) -> tuple[Any, ...]:
    """Return the arguments after the tensors in gpukern's and torch's calls, without torch's flag of averages."""
    w = pool.window
    if isinstance(w, AdaptiveProblem):
        return ((w.P, w.Q),)
    if pool.kind is Kind.MAX:
        return w.kernel, w.stride, w.padding, w.dilation, w.ceil_mode
    return w.kernel, w.stride, w.padding, w.ceil_mode, w.count_include_pad, w.divisor_override


class Pools(Suite[Pool]):
    name = "pool"
    title = "Pooling"
    computations = (FORWARD, FOR_TRAINING, BACKWARD)
    dtypes = ("float16", "bfloat16", "float32")

    def problems(self, network: str, batch: int) -> Iterator[tuple[Use, Pool]]:
        return distinct(network, batch, pool_of)

    def describe(self, problem: Pool) -> tuple[str, dict[str, Any]]:
        w, words = problem.window, describe_pool(problem)
        sizes: dict[str, Any] = {"kind": problem.kind.value}
        sizes |= {name: getattr(w, name) for name in ("N", "C", "H", "W", "P", "Q")}
        if isinstance(w, AdaptiveProblem):
            return words, sizes
        if problem.kind is Kind.AVERAGE:
            sizes |= {"count_include_pad": w.count_include_pad, "divisor_override": w.divisor_override}
        names = ("kernel", "stride", "padding", "dilation")
        return words, sizes | {name: list(getattr(w, name)) for name in names} | {"ceil_mode": w.ceil_mode}

    def applies(self, problem: Pool, computation: str) -> bool:
        # Only a maximum keeps something for its backward.
        return computation != FOR_TRAINING or problem.kind is Kind.MAX

    def steps(self, problem: Pool, training: bool) -> tuple[str, ...]:
        if not training:
            return (FORWARD,)
        return FOR_TRAINING if problem.kind is Kind.MAX else FORWARD, BACKWARD

    def work(self, task: Task[Pool]) -> Work:
        return work(task.problem.window, _pooling(task), DTYPES[task.case.dtype].itemsize)

    def bound(self, task: Task[Pool]) -> float:
        """Return the bound of sums over a window; backward, over the windows that contain an element."""
        w, backward = task.problem.window, task.case.computation == BACKWARD
        if task.problem.kind is Kind.MAX and not backward:
            return 0.0  # one of the inputs, exactly
        if isinstance(w, AdaptiveProblem):
            sides = [(w.H, w.P), (w.W, w.Q)]
            terms = math.prod(cdiv(*(reversed(side) if backward else side)) + 1 for side in sides)
        else:
            sides = list(zip(w.kernel, w.stride, strict=True))
            terms = math.prod(cdiv(*side) if backward else side[0] for side in sides)
        return sum_bound(task.case.dtype, terms)

    def tensors(self, task: Task[Pool], device: torch.device) -> Tensors:
        """x and ∂L/∂y."""
        w, dtype = task.problem.window, DTYPES[task.case.dtype]
        shapes = (w.N, w.C, w.H, w.W), (w.N, w.C, w.P, w.Q)
        return to_layout(task.case.layout, tuple(torch.randn(s, device=device).to(dtype) for s in shapes))

    def reference(self, task: Task[Pool], tensors: Tensors) -> torch.Tensor:
        saved, function = _torch(task)
        return function(*saved(tuple(t.double().contiguous() for t in tensors)))

    def implementations(self, task: Task[Pool], peers: Sequence[str], device: torch.device) -> list[Implementation]:
        layout = task.case.layout
        saved, function = _gpukern(task)
        ours = Implementation("gpukern", in_mode(layout, device), function, saved)
        saved, function = _torch(task)
        if task.case.computation != FORWARD:
            peers = [peer for peer in peers if peer == "library"]
        others = torch_peers(function, "ATen", layout, peers, device, saved)
        return [ours, *others]


def _pooling(task: Task[Pool]) -> Pooling:
    maximum = task.problem.kind is Kind.MAX
    return {
        FORWARD: Pooling.MAX if maximum else Pooling.AVG,
        FOR_TRAINING: Pooling.MAX_WITH_TAPS,
        BACKWARD: Pooling.MAX_GRAD if maximum else Pooling.AVG_GRAD,
    }[task.case.computation]


#: (what a backward is given besides its operands, worked out before the clock runs; the function)
Steps = tuple[Callable[[Tensors], Tensors], Callable[..., torch.Tensor]]


def _forward(module: Any, kind: Kind) -> Callable[..., torch.Tensor]:
    names = {Kind.MAX: "max_pool2d", Kind.AVERAGE: "avg_pool2d", Kind.ADAPTIVE: "adaptive_avg_pool2d"}
    return getattr(module, names[kind])


def _gpukern(task: Task[Pool]) -> Steps:
    pool, last = task.problem, task.case.layout == "channels_last"
    w, geometry = pool.window, geometry_of(pool)
    image = (w.N, w.C, w.H, w.W)
    if task.case.computation == FORWARD:
        function = _forward(F, pool.kind)
        return tuple, lambda x, dy: function(x, *geometry)
    if task.case.computation == FOR_TRAINING:
        return tuple, lambda x, dy: max_pool2d_with_taps(x, *geometry)[0]
    if pool.kind is Kind.MAX:
        return (
            lambda tensors: (tensors[1], max_pool2d_with_taps(tensors[0], *geometry)[1]),
            lambda dy, taps: max_pool2d_backward(dy, taps, image, last, *geometry),
        )
    if isinstance(w, PoolProblem):
        rest = w.kernel, w.stride, w.padding, w.dilation, w.ceil_mode, w.count_include_pad, w.divisor_override
        return tuple, lambda x, dy: avg_pool2d_backward(dy, image, last, *rest)
    return tuple, lambda x, dy: adaptive_avg_pool2d_backward(dy, image, last, *geometry)


def _torch(task: Task[Pool]) -> Steps:
    pool, geometry, aten = task.problem, geometry_of(task.problem), torch.ops.aten
    if task.case.computation == FORWARD:
        function = _forward(torch.nn.functional, pool.kind)
        return tuple, lambda x, dy: function(x, *geometry)
    if task.case.computation == FOR_TRAINING:
        return tuple, lambda x, dy: aten.max_pool2d_with_indices(x, *geometry)[0]
    if pool.kind is Kind.MAX:
        backward = aten.max_pool2d_with_indices_backward
        return (
            lambda tensors: (*tensors, aten.max_pool2d_with_indices(tensors[0], *geometry)[1]),
            lambda x, dy, indices: backward(dy, x, *geometry, indices),
        )
    if pool.kind is Kind.AVERAGE:
        return tuple, lambda x, dy: aten.avg_pool2d_backward(dy, x, *geometry)
    if geometry == ((1, 1),):  # torch takes the mean then, and this is the mean's derivative
        return tuple, lambda x, dy: dy.expand_as(x) / (x.shape[2] * x.shape[3])
    return tuple, lambda x, dy: aten._adaptive_avg_pool2d_backward(dy, x)


register(Pools())
