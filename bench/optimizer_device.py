"""Steps of optimizers on a GPU: how long they take. Those of ResNet-50's tensors are checked before they are timed."""

from __future__ import annotations

import gc
import importlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import gpukern.optim as optim
from bench.optimizer_steps import OPTIMIZERS, Tensors, has, ones, shapes
from bench.timing import EagerStopwatch
from gpukern.optim._fused.param_state import kept


@dataclass(frozen=True)
class Problem:
    """What is updated. ``optimizers``: those that it says something new of; None for all."""

    model: str
    groups: bool = False
    bucket: bool = False
    dtype: torch.dtype = torch.float32
    optimizers: tuple[str, ...] | None = None

    def tensors(self) -> Tensors:
        sizes = shapes(self.model)
        sizes = (sizes * 3)[:465] if self.groups else sizes
        return Tensors(sizes, self.groups, self.bucket, self.dtype, DEVICE)


_FEW = ("SGD, momentum", "Adam")
#: Of 25.6 million parameters, of 1.1 billion, of as many groups as a detector with a learning rate for each layer; and
#: what is harder to read and to write.
PROBLEMS = {
    "ResNet-50": Problem("ResNet-50"),
    "Llama 1.1B": Problem("Llama 1.1B"),
    "465 groups": Problem("ResNet-50", groups=True),
    "ResNet-50, gradients in a bucket": Problem("ResNet-50", bucket=True, optimizers=_FEW),
    "Llama 1.1B, bfloat16": Problem("Llama 1.1B", dtype=torch.bfloat16, optimizers=_FEW),
}
_APEX = {"SGD": "FusedSGD", "Adam": "FusedAdam", "AdamW": "FusedAdam", "Adagrad": "FusedAdagrad"}
_SAMPLES, _SECONDS = 9, 0.1
DEVICE = "cuda"


@dataclass(frozen=True)
class Timing:
    """Of a step; ``bandwidth`` is what must be moved, in bytes, by its time. ``problem_found``: why there is none."""

    problem: str
    optimizer: str
    candidate: str
    seconds: float = 0.0
    bandwidth: float = 0.0
    problem_found: str = ""


def copy_bandwidth(size: int = 2**30) -> float:
    """Bytes a second that a copy of ``size`` bytes reads and writes."""
    source = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source))


def seconds(call: Callable[[], Any]) -> float:
    """The median of samples between events, Python included where it is slower."""
    stopwatch, found = EagerStopwatch([call], _SECONDS), []
    for _ in range(_SAMPLES):
        stopwatch.start()
        found.append(stopwatch.stop())
    return statistics.median(found)


def measure_all(names: Sequence[str], problems: Sequence[str] = tuple(PROBLEMS)) -> list[Timing]:
    """Of these problems, in the order of the table."""
    return [
        row
        for problem, of in PROBLEMS.items()
        for name in names
        if problem in problems and (of.optimizers is None or name in of.optimizers)
        for row in measure(problem, name)
    ]


def measure(problem: str, name: str) -> Iterator[Timing]:
    """A row for each candidate. RuntimeError where ours is wrong: its time would mean nothing."""
    of = PROBLEMS[problem]
    tensors = of.tensors()
    for candidate, make in candidates(name, tensors).items():
        gc.collect()
        torch.cuda.empty_cache()
        try:
            optimizer, parameters = make()
            if candidate == "gpukern" and of.model == "ResNet-50":
                check(name, optimizer, parameters, tensors)
            taken = seconds(optimizer.step)
        except torch.cuda.OutOfMemoryError:
            yield Timing(problem, name, candidate, problem_found="out of memory")
            continue
        yield Timing(problem, name, candidate, taken, floor(name, tensors) / taken)
        del optimizer, parameters


def candidates(name: str, tensors: Tensors) -> dict[str, Callable[[], tuple[Any, list]]]:
    found = {"gpukern": lambda: ones(name, tensors, optim)}
    for way in ("fused", "foreach"):
        if has(name, way):
            found[f"torch {way}"] = lambda way=way: ones(name, tensors, torch.optim, way)
    apex = _apex(name)
    if apex is not None:
        found["apex"] = lambda: ones(name, tensors, apex)
    return found


def _apex(name: str) -> Any:
    """As a module in which apex's class has PyTorch's name; None where there is none with the same options."""
    kind, options = OPTIMIZERS[name]
    if kind not in _APEX or "amsgrad" in options:
        return None
    try:
        found = getattr(importlib.import_module("apex.optimizers"), _APEX[kind])
    except ImportError:
        return None
    return type("Apex", (), {kind: staticmethod(found)})


def check(name: str, optimizer: Any, parameters: list[torch.Tensor], tensors: Tensors) -> None:
    """Two steps as PyTorch's single-tensor code makes them, within a few roundings of fp32."""
    if not has(name, "single"):
        return
    other, expected = ones(name, tensors, torch.optim, "single")
    for number in range(2):
        for parameter, twin in zip(parameters, expected, strict=True):
            parameter.grad.normal_(generator=torch.Generator(DEVICE).manual_seed(number))
            twin.grad.copy_(parameter.grad)
        optimizer.step()
        other.step()
    for parameter, twin in zip(parameters, expected, strict=True):
        if not torch.allclose(parameter, twin, rtol=1e-5, atol=1e-7):
            raise RuntimeError(f"{name}: gpukern's step differs from torch's by {(parameter - twin).abs().max():.1e}")


def floor(name: str, tensors: Tensors) -> int:
    """Bytes that any step must read and write: the moments are of the parameters' dtype."""
    kind, options = OPTIMIZERS[name]
    optimizer = getattr(optim, kind)([torch.nn.Parameter(torch.zeros(1))], **options)
    (group,) = optimizer.param_groups
    states = sum(kept(optimizer._rule, optimizer._hyperparameters.of(group)[1]))
    return tensors.dtype.itemsize * (3 + 2 * states) * sum(torch.Size(size).numel() for size in tensors.sizes)
