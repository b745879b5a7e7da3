"""Convolutions without bias: forward, input gradient and weight gradient, each alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

import gpukern.functional as F
from bench.accuracy import DTYPES, sum_bound
from bench.layers import distinct
from bench.peers import to_layout, torch_peers
from bench.results import Case, Use
from bench.suite import Implementation, Suite, Task, Tensors, in_mode, register
from gpukern.conv import ConvProblem, Direction, minimum_work
from gpukern.explain.layers import conv_of
from gpukern.ops.conv2d import conv2d_input_grad, conv2d_weight_grad
from gpukern.runtime.roofline import Work

DIRECTIONS = {direction.value: direction for direction in Direction}


def describe(p: ConvProblem) -> tuple[str, dict[str, Any]]:
    """Describe the problem: input, filters, and values that are not the default."""
    options = {
        "stride": (p.stride, (1, 1)),
        "padding": (p.padding[::2], (0, 0)),
        "dilation": (p.dilation, (1, 1)),
        "groups": (p.groups, 1),
    }
    words = [f"{p.N}×{p.C}×{p.H}×{p.W}", f"{p.K}×{p.group_inputs}×{p.R}×{p.S}"]
    words += [f"{name} {_short(value)}" for name, (value, default) in options.items() if value != default]
    names = ("N", "C", "H", "W", "K", "R", "S", "P", "Q")
    sizes = {name: getattr(p, name) for name in names} | {name: value for name, (value, _) in options.items()}
    return ", ".join(words), {name: list(v) if isinstance(v, tuple) else v for name, v in sizes.items()}


def _short(value: Any) -> str:
    if isinstance(value, int):
        return str(value)
    return str(value[0]) if value[0] == value[1] else "×".join(map(str, value))


def conv_tensors(p: ConvProblem, case: Case, device: torch.device) -> Tensors:
    """x, w and ∂L/∂y. Weights are scaled so that y, too, has variance 1."""
    dtype, scale = DTYPES[case.dtype], (p.group_inputs * p.R * p.S) ** -0.5
    x = torch.randn(p.N, p.C, p.H, p.W, device=device)
    w = torch.randn(p.K, p.group_inputs, p.R, p.S, device=device) * scale
    dy = torch.randn(p.N, p.K, p.P, p.Q, device=device)
    return to_layout(case.layout, tuple(tensor.to(dtype) for tensor in (x, w, dy)))


class Convolutions(Suite[ConvProblem]):
    name = "conv"
    title = "Convolution"
    computations = tuple(DIRECTIONS)
    directions: Mapping[str, Direction] = DIRECTIONS

    def problems(self, network: str, batch: int) -> Iterator[tuple[Use, ConvProblem]]:
        return distinct(network, batch, conv_of)

    def describe(self, problem: ConvProblem) -> tuple[str, dict[str, Any]]:
        return describe(problem)

    def applies(self, problem: ConvProblem, computation: str) -> bool:
        # The gradient of an image is not needed.
        return not (self.directions[computation] is Direction.INPUT_GRAD and problem.C <= 3)

    def work(self, task: Task[ConvProblem]) -> Work:
        direction = self.directions[task.case.computation]
        return minimum_work(task.problem, direction, DTYPES[task.case.dtype].itemsize, task.case.dtype)

    def bound(self, task: Task[ConvProblem]) -> float:
        p = task.problem
        terms = {
            Direction.FORWARD: p.group_inputs * p.R * p.S,
            Direction.INPUT_GRAD: p.group_outputs * p.R * p.S,
            Direction.WEIGHT_GRAD: p.N * p.P * p.Q,
        }
        return sum_bound(task.case.dtype, terms[self.directions[task.case.computation]])

    def tensors(self, task: Task[ConvProblem], device: torch.device) -> Tensors:
        return conv_tensors(task.problem, task.case, device)

    def reference(self, task: Task[ConvProblem], tensors: Tensors) -> torch.Tensor:
        exact = (t.double().contiguous() for t in tensors)
        return _torch(task.problem, task.case.computation)(*exact)

    def implementations(
        self, task: Task[ConvProblem], peers: Sequence[str], device: torch.device
    ) -> list[Implementation]:
        case = task.case
        function = _torch(task.problem, case.computation)
        if case.computation != "forward":
            # Compilers and FlagGems pass the gradients of a convolution on to cuDNN.
            peers = [peer for peer in peers if peer == "library"]
        run = _gpukern(task.problem, case.computation, case.layout)
        ours = Implementation("gpukern", in_mode(case.layout, device), run)
        return [ours, *torch_peers(function, "cuDNN", case.layout, peers, device)]


def _gpukern(p: ConvProblem, computation: str, layout: str) -> Callable[..., torch.Tensor]:
    last, geometry = layout == "channels_last", (p.stride, p.padding, p.dilation, p.groups)
    image, filter = (p.N, p.C, p.H, p.W), (p.K, p.group_inputs, p.R, p.S)
    if computation == "forward":
        return lambda x, w, dy: F.conv2d(x, w, None, p.stride, p.padding[::2], p.dilation, p.groups)
    if computation == "input gradient":
        return lambda x, w, dy: conv2d_input_grad(dy, w, image, last, *geometry)
    return lambda x, w, dy: conv2d_weight_grad(dy, x, filter, last, *geometry)


def _torch(p: ConvProblem, computation: str) -> Callable[..., torch.Tensor]:
    """The same in torch; gradients by the operator that autograd calls, with a mask for one of them."""
    geometry = p.stride, p.padding[::2], p.dilation
    if computation == "forward":
        return lambda x, w, dy: torch.nn.functional.conv2d(x, w, None, *geometry, p.groups)
    which = 0 if computation == "input gradient" else 1
    wanted = [which == 0, which == 1, False]
    backward = torch.ops.aten.convolution_backward.default
    return lambda x, w, dy: backward(dy, x, w, None, *geometry, False, (0, 0), p.groups, wanted)[which]


register(Convolutions())
