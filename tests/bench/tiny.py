"""A suite of small matrix products, computed by whomever a test likes, and measured in no time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.accuracy import DTYPES, sum_bound
from bench.measure import Method
from bench.results import Case, Use
from bench.suite import Implementation, Suite, Task
from gpukern.runtime.roofline import Work

CPU = torch.device("cpu")
QUICK = Method(("library",), seconds=0.0, least_rounds=3, most_rounds=5)


class Products(Suite[tuple[int, int]]):
    """x [batch, n] times w [n, n], for n of 1 to ``layers``: layer 1 is shared by all networks."""

    name = "tiny"
    title = "Small products"
    computations = ("forward", "backward")
    dtypes = ("float32", "float16", "tf32")
    layouts = ("",)

    def __init__(self, *implementations: Implementation, layers: int = 3, bound: float | None = None) -> None:
        self.given = implementations
        self.layers = layers
        self.the_bound = bound

    def problems(self, network, batch):
        for n in range(1, self.layers + 1):
            yield Use(network, f"{network}.layer{n}", n), (batch, n if n == 1 else n * len(network))

    def describe(self, problem):
        return f"{problem[0]}×{problem[1]}", {"batch": problem[0], "n": problem[1]}

    def applies(self, problem, computation):
        return computation == "forward" or problem[1] > 1

    def work(self, task):
        batch, n = task.problem
        return Work(2.0 * batch * n * n, 4.0 * n * (2 * batch + n), task.case.dtype)

    def bound(self, task):
        return sum_bound(task.case.dtype, task.problem[1]) if self.the_bound is None else self.the_bound

    def tensors(self, task, device):
        (batch, n), dtype = task.problem, DTYPES[task.case.dtype]
        return torch.randn(batch, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)

    def reference(self, task, tensors):
        x, w = tensors
        return x.double() @ w.double()

    def implementations(self, task, peers: Sequence[str], device):
        given = list(self.given) or [candidate("gpukern", product), candidate("torch", product)]
        return given[:1] + (given[1:] if "library" in peers else [])


def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w


def candidate(name: str, function: Callable[..., Any], **others: Any) -> Implementation:
    return Implementation(name, "as it is", function, **others)


def task(batch: int = 4, n: int = 3, dtype: str = "float32") -> Task[tuple[int, int]]:
    case = Case("tiny", "forward", f"{batch}×{n}", {"n": n}, batch, dtype, "", (Use("lenet", "layer", 1),))
    return Task(case, (batch, n))
