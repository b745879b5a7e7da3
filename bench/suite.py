"""Definition of a suite: its cases, their tensors, and the implementations that compute them.

A suite is one file in :mod:`bench.suites` that defines a subclass of :class:`Suite` and registers an instance of it;
the command line, the measurement and the reports then include it.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from bench.results import Case, Use
from gpukern.runtime.mode import Mode, mode_of
from gpukern.runtime.roofline import Work
from models import zoo

Tensors = tuple[Any, ...]
P = TypeVar("P")


@dataclass(frozen=True)
class Task(Generic[P]):
    """A case, and its problem as the suite itself writes it."""

    case: Case
    problem: P


@dataclass(frozen=True)
class Implementation:
    """Someone who computes a task: gpukern, or a peer in one setting of its own.

    ``function(*prepare(tensors))`` is the result. ``prepare`` runs before the clock does: a peer gets its tensors in
    the layout that it likes best.
    """

    name: str
    setting: str
    function: Callable[..., Any]
    prepare: Callable[[Tensors], Tensors] = tuple
    #: Why it cannot run here; it is then shown as missing.
    missing: str = ""
    #: What calls from Python are timed of, if that is another function: the same, through a CUDA graph of its own.
    from_python: Callable[..., Any] | None = None
    #: It compiles before its first result, for seconds or minutes: the others are timed before that.
    slow: bool = False
    #: What it may err by, if it rounds more than the row's dtype.
    bound: float | None = None


def in_mode(setting: str, device: torch.device) -> str:
    """``setting`` of gpukern, and what really runs there if it is not its kernels on a GPU."""
    mode = Mode.KERNELS if device.type == "cuda" else mode_of(torch.empty(0, device=device))
    words = {Mode.REFERENCE: "reference mode, plain torch", Mode.EMULATED: "kernels emulated"}.get(mode, "")
    return ", ".join(filter(None, (setting, words)))


class Suite(abc.ABC, Generic[P]):
    """Tasks of one kind. ``name`` is the command; the first computation, dtype and layout are the most telling."""

    name: str
    title: str
    computations: tuple[str, ...]
    dtypes: tuple[str, ...] = ("float16", "bfloat16", "tf32", "float32")
    layouts: tuple[str, ...] = ("channels_last", "NCHW")
    #: Calls rotate through many sets of tensors, as the real use finds them in device memory and not in the L2 cache.
    cold: bool = True
    #: Whether calls can be captured: else they are timed from Python alone.
    graphs: bool = True
    #: Whether its kernels are Triton's, which can be compiled before they are launched.
    in_triton: bool = True
    #: A task launches many different kernels: those of one task are compiled by several processes.
    many_kernels: bool = False
    #: Defaults of the command line.
    networks: tuple[str, ...] = ("resnet50",)
    batches: tuple[int, ...] = (32,)

    def networks_called(self, word: str) -> list[str]:
        """Return the networks that a word on the command line names; ValueError if there are none."""
        return list(zoo.NETWORKS) if word.lower() == "all" else [zoo.network(word).name]

    @abc.abstractmethod
    def problems(self, network: str, batch: int) -> Iterator[tuple[Use, P]]:
        """The network's distinct problems and where it has them."""

    @abc.abstractmethod
    def describe(self, problem: P) -> tuple[str, dict[str, Any]]:
        """The sizes in words and by name."""

    def applies(self, problem: P, computation: str) -> bool:
        """Whether there is such a case: a network's first layer has no input gradient, for instance."""
        return True

    def steps(self, problem: P, training: bool) -> tuple[str, ...]:
        """The computations that one pass through a network makes of a layer with this problem."""
        if not training:
            return self.computations[:1]
        return tuple(each for each in self.computations if self.applies(problem, each))

    @abc.abstractmethod
    def work(self, task: Task[P]) -> Work:
        """Return the work of any implementation: its FLOPs and bytes."""

    @abc.abstractmethod
    def bound(self, task: Task[P]) -> float:
        """The largest error of a right result, see :mod:`bench.accuracy`."""

    @abc.abstractmethod
    def tensors(self, task: Task[P], device: torch.device) -> Tensors:
        """Random operands in the case's dtype and layout; new ones on each call."""

    @abc.abstractmethod
    def reference(self, task: Task[P], tensors: Tensors) -> torch.Tensor:
        """The result in float64."""

    def result(self, output: Any) -> torch.Tensor:
        """Return the part of a function's output that is compared with the reference."""
        return output

    @abc.abstractmethod
    def implementations(self, task: Task[P], peers: Sequence[str], device: torch.device) -> list[Implementation]:
        """gpukern first, then those of ``peers`` (names of :data:`bench.peers.PEERS`) that make sense here."""


SUITES: dict[str, Suite] = {}


def register(suite: Suite) -> None:
    if suite.name in SUITES:
        raise ValueError(f"two suites are called {suite.name}")
    SUITES[suite.name] = suite


def suites() -> dict[str, Suite]:
    """Return all suites by name; imports every file of :mod:`bench.suites`."""
    package = importlib.import_module("bench.suites")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"bench.suites.{module.name}")
    return SUITES


@dataclass(frozen=True)
class Selection:
    """A selection of a suite's tasks: those of every combination."""

    networks: tuple[str, ...]
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    layouts: tuple[str, ...]
    computations: tuple[str, ...]
    #: Only cases whose key or layer holds this; one alone whose key it is.
    containing: str = ""


def tasks(suite: Suite, selection: Selection) -> list[Task]:
    """One task a distinct key: what several networks share is measured once, and lists all its uses."""
    found: dict[str, Task] = {}
    combinations = itertools.product(
        selection.computations, selection.dtypes, selection.layouts, selection.batches, selection.networks
    )
    for computation, dtype, layout, batch, network in combinations:
        for use, problem in suite.problems(network, batch):
            if suite.applies(problem, computation):
                words, sizes = suite.describe(problem)
                case = Case(suite.name, computation, words, sizes, batch, dtype, layout, (use,))
                if known := found.get(case.key):
                    case, problem = dataclasses.replace(case, uses=merged(known.case.uses, case.uses)), known.problem
                found[case.key] = Task(case, problem)
    wanted = selection.containing
    if wanted in found:
        return [found[wanted]]
    return [t for t in found.values() if wanted in t.case.key or any(wanted in use.layer for use in t.case.uses)]


def merged(uses: tuple[Use, ...], more: tuple[Use, ...]) -> tuple[Use, ...]:
    """Merge all uses, each network once: the later use of a network counts."""
    by_network = {use.network: use for use in (*uses, *more)}
    return tuple(by_network.values())
