"""Convolution, bias, residual and ReLU in one pass over memory, as a network for inference has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

import gpukern.functional as F
from bench.accuracy import DTYPES
from bench.peers import compiled, to_layout, torch_peers
from bench.suite import Implementation, Task, Tensors, in_mode, register
from bench.suites.conv import Convolutions, conv_tensors
from gpukern.conv import ConvProblem, Direction
from gpukern.runtime.roofline import Work

_WITH_RESIDUAL = "bias + residual + ReLU"


class EpilogueConvolutions(Convolutions):
    name = "epilogue"
    title = "Convolution with a fused epilogue"
    directions = {"bias + ReLU": Direction.FORWARD, _WITH_RESIDUAL: Direction.FORWARD}  # noqa: RUF012 - constant
    computations = tuple(directions)

    def work(self, task: Task[ConvProblem]) -> Work:
        """The residual is read once more than the convolution's own tensors; the bias is too small to count."""
        p, must = task.problem, super().work(task)
        if not _has_residual(task):
            return must
        return replace(must, bytes=must.bytes + p.N * p.K * p.P * p.Q * DTYPES[task.case.dtype].itemsize)

    def tensors(self, task: Task[ConvProblem], device: torch.device) -> Tensors:
        """x, w, bias and, of the output's shape, the residual."""
        p, dtype = task.problem, DTYPES[task.case.dtype]
        x, w, _ = conv_tensors(p, task.case, device)
        tensors = x, w, torch.randn(p.K, device=device).to(dtype)
        if not _has_residual(task):
            return tensors
        residual = torch.randn(p.N, p.K, p.P, p.Q, device=device).to(dtype)
        return *tensors, *to_layout(task.case.layout, (residual,))

    def reference(self, task: Task[ConvProblem], tensors: Tensors) -> torch.Tensor:
        return _torch(task)(*(t.double().contiguous() for t in tensors))

    def implementations(
        self, task: Task[ConvProblem], peers: Sequence[str], device: torch.device
    ) -> list[Implementation]:
        layout, geometry = task.case.layout, _geometry(task.problem)
        setting = in_mode(f"{layout}, one kernel", device)

        def gpukern(x, w, b, residual=None) -> torch.Tensor:
            return F.conv2d(x, w, b, *geometry, residual=residual, activation="relu")

        pointwise = "+ add + ReLU" if _has_residual(task) else "+ ReLU"
        found = [Implementation("gpukern", setting, gpukern)]
        found += torch_peers(_torch(task), f"cuDNN {pointwise}", layout, peers, device)
        if "library" in peers:
            found.append(_cudnn_fused(task, device))
        if "compile" in peers and _has_residual(task):
            found.append(_one_pointwise_kernel(task))
        return found


def _has_residual(task: Task[ConvProblem]) -> bool:
    return task.case.computation == _WITH_RESIDUAL


def _geometry(p: ConvProblem) -> tuple:
    return p.stride, p.padding[::2], p.dilation, p.groups


def _torch(task: Task[ConvProblem]) -> Callable[..., torch.Tensor]:
    geometry = _geometry(task.problem)
    if _has_residual(task):
        return lambda x, w, b, residual: torch.nn.functional.conv2d(x, w, b, *geometry).add_(residual).relu_()
    return lambda x, w, b: torch.nn.functional.conv2d(x, w, b, *geometry).relu_()


def _cudnn_fused(task: Task[ConvProblem], device: torch.device) -> Implementation:
    """cuDNN's own fused kernels, which PyTorch calls only by their names."""
    # The residual is scaled by a number behind it.
    name, scale = ("cudnn_convolution_add_relu", (1.0,)) if _has_residual(task) else ("cudnn_convolution_relu", ())
    fused, geometry = getattr(torch.ops.aten, name).default, _geometry(task.problem)
    missing = "" if device.type == "cuda" else "cuDNN needs a CUDA device"
    return Implementation(
        "cuDNN fused",
        f"{task.case.layout}, {name}",
        lambda x, w, b, *residual: fused(x, w, *residual, *scale, b, *geometry),
        missing=missing,
    )


def _one_pointwise_kernel(task: Task[ConvProblem]) -> Implementation:
    """cuDNN's convolution, and all that follows in one kernel of torch.compile's."""
    geometry = _geometry(task.problem)
    epilogue = compiled(lambda y, b, residual: torch.relu(y + b[:, None, None] + residual), "", task.case.layout)

    def run(x, w, b, residual) -> torch.Tensor:
        return epilogue.function(torch.nn.functional.conv2d(x, w, None, *geometry), b, residual)

    setting = f"{task.case.layout}, torch.compile of the pointwise part"
    return Implementation("cuDNN + one kernel", setting, run, slow=True)


register(EpilogueConvolutions())
