"""The three ways of one training step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

import gpukern
import gpukern.optim as optim
from bench.optimizer_steps import Nothing, Tensors, launches, ones, operations, stubbed_launch
from bench.training_step.count import Activations, Counter, Pass, Traffic
from gpukern.runtime.device import DeviceSpec

_OPTIMIZER = "SGD, momentum"
BACKEND = "gpukern"


@dataclass(frozen=True)
class Step:
    """``forward`` ends with the loss. ``optimizer``: its launches. ``saved``: the bytes that backward keeps alive.

    ``by_name``: forward and backward, by the names of kernels and operators.
    """

    forward: Traffic
    backward: Traffic
    optimizer: int
    saved: int
    by_name: dict[str, Traffic]

    @property
    def moved(self) -> Traffic:
        return self.forward + self.backward

    @property
    def launches(self) -> int:
        return self.moved.launches + self.optimizer


@dataclass(frozen=True)
class Steps:
    """The step of one network all three ways; ``compile`` is None where there is no such backend."""

    pytorch: Step
    convert: Step
    compile: Step | None


def why_not_compiled() -> str:
    """Why ``torch.compile`` does not have our backend; empty if it has."""
    if BACKEND not in torch._dynamo.list_backends():
        return f"torch.compile has no backend {BACKEND}"
    try:
        torch._dynamo.lookup_backend(BACKEND)
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def count(
    model: torch.nn.Module,
    input: torch.Size | Sequence[int],
    dtype: torch.dtype,
    device: DeviceSpec,
    options: dict[str, Any] | None = None,
) -> Steps:
    """Count the steps of a network on an ``input`` of [N, C, H, W], in channels_last and ``dtype``.

    ``options`` are those of ``torch.compile``.
    """
    model = model.to(dtype, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    sizes = [each.numel() for each in model.parameters()]
    eager = _run(copy.deepcopy(model).to("meta"), input, dtype, None)
    activations = Activations(eager.shapes | {tuple(input)}, input[0], dtype, model)
    ours = _optimizer_launches(sizes)
    convert = _run(gpukern.convert(model), input, dtype, device).counted(activations, ours)
    compiled = None
    if not why_not_compiled():
        torch._dynamo.reset()
        forward: Any = torch.compile(copy.deepcopy(model), backend=BACKEND, options=options)
        compiled = _run(forward, input, dtype, device).counted(activations, ours)
    return Steps(eager.counted(activations, _optimizer_launches_of_torch(sizes)), convert, compiled)


@dataclass(frozen=True)
class _Run:
    """What ran in a step, and which shapes PyTorch's operators gave in its forward pass."""

    forward: Sequence[Pass]
    backward: Sequence[Pass]
    shapes: set[tuple[int, ...]]
    saved: int

    def counted(self, activations: Activations, optimizer: int) -> Step:
        forward, backward = (Traffic.of(part, activations) for part in (self.forward, self.backward))
        named: dict[str, list[Pass]] = {}
        for each in (*self.forward, *self.backward):
            named.setdefault(each.name, []).append(each)
        by_name = {name: Traffic.of(launched, activations) for name, launched in named.items()}
        return Step(forward, backward, optimizer, self.saved, by_name)


def _run(model: torch.nn.Module, input: Sequence[int], dtype: torch.dtype, device: DeviceSpec | None) -> _Run:
    """Run the second step of ``model`` where its parameters are: the first compiles, and makes what is made once."""
    where = next(model.parameters()).device
    images = torch.zeros(tuple(input), dtype=dtype, device=where).contiguous(memory_format=torch.channels_last)
    with Counter(model).running(device):
        output = model(images)
        labels = torch.zeros((len(output), *output.shape[2:]), dtype=torch.long, device=where)
        F.cross_entropy(output, labels).backward()
    model.zero_grad()
    counter = Counter(model)
    with counter.running(device):
        with counter.saving():
            loss = F.cross_entropy(model(images), labels)
        of_forward, shapes = len(counter.launched), set(counter.shapes)
        loss.backward()
    launched = counter.launched
    return _Run(launched[:of_forward], launched[of_forward:], shapes, sum(counter.saved.values()))


def _optimizer_launches(sizes: Sequence[int]) -> int:
    """Ours in a step that is not the first."""
    with stubbed_launch():
        optimizer, _ = ones(_OPTIMIZER, Tensors([(1,)] * len(sizes)), optim)
        optimizer.step()
        Nothing.launched.clear()
        optimizer.step()
        return len(Nothing.launched)


def _optimizer_launches_of_torch(sizes: Sequence[int]) -> int:
    """PyTorch's in its default way, with launches of 32 KB of arguments."""
    found = operations(_OPTIMIZER, "foreach", len(sizes))
    return sum(launches(each, sizes, "32 KB") for each in found)
