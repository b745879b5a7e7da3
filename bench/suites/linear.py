"""Fully-connected layers: forward with bias, input gradient and weight gradient, each alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

import gpukern.functional as F
from bench.accuracy import DTYPES, sum_bound
from bench.layers import distinct
from bench.peers import torch_peers
from bench.results import Use
from bench.suite import Implementation, Suite, Task, Tensors, in_mode, register
from bench.suites.conv import DIRECTIONS
from gpukern.conv import ConvProblem, conv_problem, minimum_work
from gpukern.explain.layers import Linear, linear_of
from gpukern.ops.linear import linear, linear_weight_grad
from gpukern.runtime.roofline import Work


def as_convolution(p: Linear) -> ConvProblem:
    """``p`` as gpukern computes it."""
    geometry = (1, 1), (0, 0, 0, 0), (1, 1), 1
    return conv_problem((p.rows, p.inputs, 1, 1), (p.outputs, p.inputs, 1, 1), None, *geometry)


class Linears(Suite[Linear]):
    name = "linear"
    title = "Fully-connected layer"
    computations = tuple(DIRECTIONS)
    layouts = ("",)

    def problems(self, network: str, batch: int) -> Iterator[tuple[Use, Linear]]:
        return distinct(network, batch, linear_of)

    def describe(self, problem: Linear) -> tuple[str, dict[str, Any]]:
        return f"{problem.rows}×{problem.inputs} to {problem.rows}×{problem.outputs}", asdict(problem)

    def work(self, task: Task[Linear]) -> Work:
        direction, dtype = DIRECTIONS[task.case.computation], task.case.dtype
        return minimum_work(as_convolution(task.problem), direction, DTYPES[dtype].itemsize, dtype)

    def bound(self, task: Task[Linear]) -> float:
        p = task.problem
        terms = {"forward": p.inputs, "input gradient": p.outputs, "weight gradient": p.rows}
        return sum_bound(task.case.dtype, terms[task.case.computation])

    def tensors(self, task: Task[Linear], device: torch.device) -> Tensors:
        """x, w, bias and ∂L/∂y."""
        p, dtype = task.problem, DTYPES[task.case.dtype]
        x = torch.randn(p.rows, p.inputs, device=device)
        w = torch.randn(p.outputs, p.inputs, device=device) * p.inputs**-0.5
        bias, dy = torch.randn(p.outputs, device=device), torch.randn(p.rows, p.outputs, device=device)
        return tuple(tensor.to(dtype) for tensor in (x, w, bias, dy))

    def reference(self, task: Task[Linear], tensors: Tensors) -> torch.Tensor:
        return _torch(task.case.computation)(*(t.double() for t in tensors))

    def implementations(self, task: Task[Linear], peers: Sequence[str], device: torch.device) -> list[Implementation]:
        ours = Implementation("gpukern", in_mode("", device), _gpukern(task.case.computation))
        return [ours, *torch_peers(_torch(task.case.computation), "cuBLAS", "", peers, device)]


def _gpukern(computation: str) -> Callable[..., torch.Tensor]:
    if computation == "forward":
        return lambda x, w, bias, dy: F.linear(x, w, bias)
    if computation == "input gradient":
        return lambda x, w, bias, dy: linear(dy, w.t(), None, "none", 0.0)
    return lambda x, w, bias, dy: linear_weight_grad(dy, x)


def _torch(computation: str) -> Callable[..., torch.Tensor]:
    if computation == "forward":
        return lambda x, w, bias, dy: torch.nn.functional.linear(x, w, bias)
    if computation == "input gradient":
        return lambda x, w, bias, dy: dy @ w
    return lambda x, w, bias, dy: dy.t() @ x


register(Linears())
