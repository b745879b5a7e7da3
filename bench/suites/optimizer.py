"""Steps of optimizers over all parameters of a network, beside PyTorch's fused and for-each ones and apex's."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import gpukern.optim as optim
from bench.accuracy import DTYPES
from bench.optimizer_steps import LLAMA, OPTIMIZERS, Tensors, floor, has, ones, shapes
from bench.results import Use
from bench.suite import Implementation, Suite, Task, in_mode, register
from bench.suite import Tensors as Operands
from gpukern.runtime.mode import Mode, force_mode
from gpukern.runtime.roofline import Work

#: Those of which a harder layout in memory, or a harder dtype, adds information.
_FEW = ("SGD, momentum", "Adam")
_APEX = {"SGD": "FusedSGD", "Adam": "FusedAdam", "AdamW": "FusedAdam", "Adagrad": "FusedAdagrad"}
#: Parameters that are compared: for a language model a part suffices, and fits into memory in float64.
_COMPARED = 10**8
#: One before the clock runs, in which moments are made, and the one that is compared.
_STEPS = 2


@dataclass(frozen=True)
class Update:
    """What is updated. ``groups``: more tensors, each in a group of its own, as of a detector with a learning rate for
    each layer; ``bucket``: gradients one behind the other, as DistributedDataParallel leaves them."""

    model: str
    groups: bool = False
    bucket: bool = False

    def tensors(self, dtype: torch.dtype, device: torch.device) -> Tensors:
        sizes = shapes(self.model)
        if self.groups:
            sizes = (sizes * 3)[:465]
        return Tensors(sizes, self.groups, self.bucket, dtype, device)


@dataclass
class Stepper:
    """An optimizer and what it updates; no tensor, as what is returned must stay as it is between steps."""

    optimizer: Any
    parameters: list[torch.nn.Parameter]

    def step(self) -> Stepper:
        self.optimizer.step()
        return self


class Optimizers(Suite[Update]):
    name = "optimizer"
    title = "Step of an optimizer"
    computations = tuple(OPTIMIZERS)
    dtypes = ("float32", "bfloat16")
    layouts = ("",)
    #: A step sweeps through more memory than the cache holds by itself.
    cold = False
    #: PyTorch's count steps on the host by default.
    graphs = False
    in_triton = False
    networks = ("resnet50", LLAMA)
    batches = (1,)

    def networks_called(self, word: str) -> list[str]:
        return [LLAMA] if word.lower() == LLAMA else super().networks_called(word)

    def problems(self, network: str, batch: int) -> Iterator[tuple[Use, Update]]:
        for variant in ({}, {"groups": True}, {"bucket": True}) if network != LLAMA else ({},):
            yield Use(network, "".join(variant) or "plain", 1), Update(network, **variant)

    def describe(self, problem: Update) -> tuple[str, dict[str, Any]]:
        sizes = problem.tensors(torch.float32, torch.device("meta")).sizes
        count = sum(torch.Size(size).numel() for size in sizes)
        words = f"{problem.model}, {len(sizes)} tensors of {count:,} parameters"
        words += ", each a group" * problem.groups + ", gradients in a bucket" * problem.bucket
        about = {"model": problem.model, "groups": problem.groups, "bucket": problem.bucket}
        return words, about | {"tensors": len(sizes), "parameters": count}

    def applies(self, problem: Update, computation: str) -> bool:
        return not problem.bucket or computation in _FEW

    def work(self, task: Task[Update]) -> Work:
        moved = floor(task.case.computation, task.problem.tensors(DTYPES[task.case.dtype], torch.device("meta")))
        return Work(0.0, moved, task.case.dtype)

    def bound(self, task: Task[Update]) -> float:
        """Each step rounds the parameter once, and what it adds is smaller than that: twice as much."""
        return 2 * _STEPS * torch.finfo(DTYPES[task.case.dtype]).eps

    def tensors(self, task: Task[Update], device: torch.device) -> Operands:
        """Gradients, which all candidates share."""
        made = task.problem.tensors(DTYPES[task.case.dtype], device).made()
        return tuple(parameter.grad.normal_() for parameter in made if parameter.grad is not None)

    def reference(self, task: Task[Update], tensors: Operands) -> torch.Tensor:
        """Compute by PyTorch's single-tensor code, or by ours if PyTorch has no such optimizer."""
        of = task.problem.tensors(torch.float64, tensors[0].device)
        sizes, exact = zip(*_compared(list(zip(of.sizes, tensors, strict=True))), strict=True)
        of, name = Tensors(sizes, of.groups, dtype=torch.float64, device=of.device), task.case.computation
        with force_mode(Mode.REFERENCE):
            given = (torch.optim, "single") if has(name, "single") else (optim, "")
            stepper = _begun(*ones(name, of, *given), tuple(gradient.double() for gradient in exact))
            return self.result(stepper.step())

    def result(self, output: Stepper) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for _, parameter in _compared(_sized(output.parameters))])

    def implementations(self, task: Task[Update], peers: Sequence[str], device: torch.device) -> list[Implementation]:
        name, of = task.case.computation, task.problem.tensors(DTYPES[task.case.dtype], device)

        def candidate(called: str, setting: str, module: Any, way: str = "") -> Implementation:
            return Implementation(
                called, setting, Stepper.step, lambda gradients: (_begun(*ones(name, of, module, way), gradients),)
            )

        found = [candidate("gpukern", in_mode("", device), optim)]
        if "library" in peers:
            found += [
                candidate(f"torch {w}", f"{w}=True", torch.optim, w) for w in ("fused", "foreach") if has(name, w)
            ]
            if (apex := _apex(name)) is not None:
                found.append(candidate("apex", "", apex))
        return found


def _begun(optimizer: Any, parameters: list[torch.nn.Parameter], gradients: Operands) -> Stepper:
    """After a first step, in which the moments are made."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return Stepper(optimizer, parameters).step()


def _sized(parameters: Sequence[torch.Tensor]) -> list[tuple[torch.Size, torch.Tensor]]:
    return [(parameter.shape, parameter) for parameter in parameters]


def _compared(sized: Sequence[tuple[Any, torch.Tensor]]) -> list[tuple[Any, torch.Tensor]]:
    """The first of (size, tensor), one at least."""
    totals = itertools.accumulate(tensor.numel() for _, tensor in sized)
    return [pair for pair, total in zip(sized, totals, strict=True) if total <= _COMPARED] or list(sized[:1])


def _apex(name: str) -> Any:
    """Return a module in which apex's class has PyTorch's name; None if there is none with the same options."""
    kind, options = OPTIMIZERS[name]
    if kind not in _APEX or "amsgrad" in options:
        return None
    try:
        found = getattr(importlib.import_module("apex.optimizers"), _APEX[kind])
    except ImportError:
        return None
    return type("Apex", (), {kind: staticmethod(found)})


register(Optimizers())
