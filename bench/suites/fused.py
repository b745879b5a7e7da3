"""Convolution, bias and ReLU in one pass over memory, as a network for inference has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import gpukern.functional as F
from bench.accuracy import DTYPES
from bench.peers import torch_peers
from bench.suite import Implementation, Task, Tensors, in_mode, register
from bench.suites.conv import Convolutions, conv_tensors
from gpukern.ops._conv2d.plan import Direction
from gpukern.ops._conv2d.problem import ConvProblem


class FusedConvolutions(Convolutions):
    name = "fused"
    title = "Convolution with a fused epilogue"
    directions = {"bias + ReLU": Direction.FORWARD}  # noqa: RUF012 - constant
    computations = tuple(directions)

    def tensors(self, task: Task[ConvProblem], device: torch.device) -> Tensors:
        """x, w and bias."""
        x, w, _ = conv_tensors(task.problem, task.case, device)
        return x, w, torch.randn(task.problem.K, device=device).to(DTYPES[task.case.dtype])

    def reference(self, task: Task[ConvProblem], tensors: Tensors) -> torch.Tensor:
        return _torch(task.problem)(*(t.double().contiguous() for t in tensors))

    def implementations(
        self, task: Task[ConvProblem], peers: Sequence[str], device: torch.device
    ) -> list[Implementation]:
        p, layout = task.problem, task.case.layout
        geometry = p.stride, p.padding[::2], p.dilation, p.groups
        setting = in_mode(f"{layout}, one kernel", device)
        ours = Implementation("gpukern", setting, lambda x, w, b: F.conv2d(x, w, b, *geometry, activation="relu"))
        others = torch_peers(_torch(p), "cuDNN + ReLU", layout, peers, device)
        if "library" in peers:
            fused = torch.ops.aten.cudnn_convolution_relu.default
            setting = f"{layout}, cudnn_convolution_relu"
            missing = "" if device.type == "cuda" else "cuDNN needs a CUDA device"
            others.append(
                Implementation("cuDNN fused", setting, lambda x, w, b: fused(x, w, b, *geometry), missing=missing)
            )
        return [ours, *others]


def _torch(p: ConvProblem):
    geometry = p.stride, p.padding[::2], p.dilation, p.groups
    return lambda x, w, b: torch.nn.functional.conv2d(x, w, b, *geometry).relu_()


register(FusedConvolutions())
