"""Batch, group and instance norm of the tensors that a network's batch norms take, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

import gpukern.functional as F
from bench.accuracy import DTYPES, sum_bound
from bench.layers import distinct
from bench.peers import to_layout, torch_peers
from bench.results import Use
from bench.suite import Implementation, Suite, Task, Tensors, in_mode, register
from gpukern.explain.layers import LayerCall
from gpukern.ops.batch_norm import batch_norm_backward, batch_norm_training
from gpukern.ops.group_norm import group_norm, group_norm_backward
from gpukern.runtime.roofline import Work

BATCH, GROUP, INSTANCE = "batch norm", "group norm", "instance norm"
_BACKWARD = " backward"
_GROUPS = 32
_EPS = 1e-5


class Size(NamedTuple):
    N: int
    C: int
    H: int
    W: int


class Norms(Suite[Size]):
    name = "norm"
    title = "Normalization"
    computations = tuple(norm + direction for norm in (BATCH, GROUP, INSTANCE) for direction in ("", _BACKWARD))
    dtypes = ("float16", "bfloat16", "float32")

    def problems(self, network: str, batch: int) -> Iterator[tuple[Use, Size]]:
        return distinct(network, batch, _size_of)

    def describe(self, problem: Size) -> tuple[str, dict[str, Any]]:
        return "×".join(map(str, problem)), problem._asdict()

    def applies(self, problem: Size, computation: str) -> bool:
        return _norm(computation) != GROUP or problem.C % _GROUPS == 0

    def steps(self, problem: Size, training: bool) -> tuple[str, ...]:
        return (BATCH, BATCH + _BACKWARD) if training else (BATCH,)

    def work(self, task: Task[Size]) -> Work:
        """The numbers of channels are too few to count; forward x and y, backward x, ∂L/∂y and ∂L/∂x."""
        p, backward = task.problem, task.case.computation.endswith(_BACKWARD)
        elements = p.N * p.C * p.H * p.W
        tensors = 3 if backward else 2
        return Work(0.0, tensors * elements * DTYPES[task.case.dtype].itemsize, task.case.dtype)

    def bound(self, task: Task[Size]) -> float:
        p = task.problem
        values = {BATCH: p.N, GROUP: p.C // _GROUPS, INSTANCE: 1}[_norm(task.case.computation)] * p.H * p.W
        return sum_bound(task.case.dtype, values)

    def tensors(self, task: Task[Size], device: torch.device) -> Tensors:
        """x, ∂L/∂y, weight and bias."""
        p, dtype = task.problem, DTYPES[task.case.dtype]
        images = to_layout(task.case.layout, tuple(torch.randn(p, device=device).to(dtype) for _ in range(2)))
        return *images, *(torch.randn(p.C, device=device).to(dtype) for _ in range(2))

    def reference(self, task: Task[Size], tensors: Tensors) -> torch.Tensor:
        x, grad, w, b = (t.double().contiguous() for t in tensors)
        leaf = x.requires_grad_()
        y = _forward(torch.nn.functional, task, leaf, w, b)
        return torch.autograd.grad(y, leaf, grad)[0] if task.case.computation.endswith(_BACKWARD) else y.detach()

    def implementations(self, task: Task[Size], peers: Sequence[str], device: torch.device) -> list[Implementation]:
        setting = in_mode(task.case.layout, device)
        if not task.case.computation.endswith(_BACKWARD):
            ours = Implementation("gpukern", setting, lambda x, dy, w, b: _forward(F, task, x, w, b))
            return [
                ours,
                *torch_peers(
                    lambda x, dy, w, b: _forward(torch.nn.functional, task, x, w, b),
                    "ATen", task.case.layout, peers, device,
                ),
            ]  # fmt: skip
        peers = [peer for peer in peers if peer == "library"]
        ours = Implementation("gpukern", setting, lambda *given: _our_backward(task, *given), lambda t: _saved(task, t))
        theirs = torch_peers(
            lambda *given: _torchs_backward(task, *given), "ATen", task.case.layout, peers, device,
            lambda t: _torchs_saved(task, t),
        )  # fmt: skip
        return [ours, *theirs]


def _size_of(call: LayerCall) -> Size | None:
    return Size(*call.input_shape) if isinstance(call.module, torch.nn.BatchNorm2d) else None


def _norm(computation: str) -> str:
    return computation.removesuffix(_BACKWARD)


def _groups(task: Task[Size]) -> int:
    return _GROUPS if _norm(task.case.computation) == GROUP else task.problem.C


def _forward(functions: Any, task: Task[Size], x, w, b) -> torch.Tensor:
    norm = _norm(task.case.computation)
    if norm == BATCH:
        return functions.batch_norm(x, None, None, w, b, True, 0.1, _EPS)
    if norm == GROUP:
        return functions.group_norm(x, _GROUPS, w, b, _EPS)
    return functions.instance_norm(x, None, None, w, b, True, 0.1, _EPS)


# ---- the input's gradient, with what autograd saves of the forward ---------------------------------------------------


def _saved(task: Task[Size], tensors: Tensors) -> Tensors:
    x, grad, w, b = tensors
    if _norm(task.case.computation) == BATCH:
        _, *statistics = batch_norm_training(x, w, b, None, _EPS, "none", 0.0)
    else:
        _, *statistics = group_norm(x, w, b, None, _groups(task), _EPS, "none", 0.0)
    return grad, x, w, b, None, *statistics


def _our_backward(task: Task[Size], *given: Any) -> torch.Tensor:
    rest = _EPS, "none", 0.0, True, True, False
    if _norm(task.case.computation) == BATCH:
        return batch_norm_backward(*given, True, *rest)[0]
    return group_norm_backward(*given, _groups(task), *rest)[0]


def _torchs_saved(task: Task[Size], tensors: Tensors) -> Tensors:
    """Instance norm is a batch norm of one image of N · C channels, of a copy in NCHW: as in PyTorch's forward."""
    x, grad, w, b = tensors
    norm, aten = _norm(task.case.computation), torch.ops.aten
    if norm == GROUP:
        return x, grad, w, *aten.native_group_norm(x, w, b, *task.problem[:2], x[0, 0].numel(), _GROUPS, _EPS)[1:]
    if norm == INSTANCE:
        x, w, b = _as_one_image(x), w.repeat(len(x)), b.repeat(len(x))
    return x, grad, w, *aten.native_batch_norm(x, w, b, None, None, True, 0.1, _EPS)[1:]


def _torchs_backward(task: Task[Size], x, grad, w, mean, inverse) -> torch.Tensor:
    norm, aten, wanted = _norm(task.case.computation), torch.ops.aten, [True] * 3
    if norm == GROUP:
        sizes = *task.problem[:2], x[0, 0].numel()
        # On a CPU it takes both in the layout of the input.
        grad = grad.contiguous(memory_format=torch.channels_last) if not x.is_contiguous() else grad
        return aten.native_group_norm_backward(grad, x, mean, inverse, w, *sizes, _GROUPS, wanted)[0]
    images = grad.shape
    grad = _as_one_image(grad) if norm == INSTANCE else grad
    result = aten.native_batch_norm_backward(grad, x, w, None, None, mean, inverse, True, _EPS, wanted)[0]
    return result.view(images) if norm == INSTANCE else result


def _as_one_image(images: torch.Tensor) -> torch.Tensor:
    return images.contiguous().view(1, -1, *images.shape[2:])


register(Norms())
