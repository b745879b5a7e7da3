"""Whole networks as the rows of a suite: what all such suites have in common."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from bench.results import Use
from bench.suite import Suite, Task
from bench.suites.conv import Convolutions
from bench.suites.linear import Linears
from bench.suites.pool import Pools
from gpukern.runtime.roofline import Work
from models.zoo import network


@dataclass(frozen=True)
class WholeNetwork:
    name: str
    batch: int


class Networks(Suite[WholeNetwork]):
    #: A network sweeps through more memory than the cache holds by itself.
    cold = False
    many_kernels = True

    def problems(self, name: str, batch: int) -> Iterator[tuple[Use, WholeNetwork]]:
        yield Use(network(name).name, "", 1), WholeNetwork(network(name).name, batch)

    def describe(self, problem: WholeNetwork) -> tuple[str, dict[str, Any]]:
        found = network(problem.name)
        size = "×".join(map(str, (problem.batch, *found.input_size)))
        return f"{found.title}, {size}", {"network": found.name, "input": [problem.batch, *found.input_size]}

    def work(self, task: Task[WholeNetwork]) -> Work:
        """The sum over convolutions, pools and linear layers, each from memory to memory, as they run one by one."""
        works = [(part.case.uses[0].count, suite.work(part)) for suite, part in self.parts(task)]
        return Work(sum(n * w.flops for n, w in works), sum(n * w.bytes for n, w in works), task.case.dtype)

    def trains(self, task: Task[WholeNetwork]) -> bool:
        return False

    def parts(self, task: Task[WholeNetwork]) -> Iterator[tuple[Suite, Task]]:
        """The network's layers as tasks of their own suites."""
        made: tuple[Suite[Any], ...] = (Convolutions(), Pools(), Linears())
        for suite in made:
            layout = task.case.layout if task.case.layout in suite.layouts else suite.layouts[0]
            for use, problem in suite.problems(task.problem.name, task.problem.batch):
                for computation in suite.steps(problem, self.trains(task)):
                    case = replace(task.case, suite=suite.name, computation=computation, layout=layout, uses=(use,))
                    yield suite, Task(case, problem)


@functools.lru_cache(maxsize=1)
def weights(name: str) -> nn.Module:
    """The network with the random weights that all candidates have, and the reference."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return network(name).make()


def sums(name: str) -> list[int]:
    """Return how many products each layer of the network adds up."""
    layers = [layer for layer in weights(name).modules() if isinstance(layer, (*_CONVOLUTIONS, nn.Linear))]
    return [_terms(layer) for layer in layers]


_CONVOLUTIONS = nn.Conv2d, nn.ConvTranspose2d


def _terms(layer: nn.Module) -> int:
    if isinstance(layer, nn.Linear):
        return layer.in_features
    assert isinstance(layer, _CONVOLUTIONS)
    taps = math.prod(layer.kernel_size)
    if isinstance(layer, nn.ConvTranspose2d):
        taps = -(-taps // math.prod(layer.stride))  # of all outputs together, each has its share
    return layer.in_channels // layer.groups * taps


def placed(model: nn.Module, device: torch.device, dtype: torch.dtype, layout: str) -> nn.Module:
    """A copy, as a candidate runs it."""
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return copy.deepcopy(model).to(device, dtype, memory_format=memory_format)  # type: ignore[call-overload]
