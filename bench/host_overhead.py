"""Host microseconds of one call, up to the launch: ``python -m bench.host_overhead``.

Everything that gpukern does in Python before a kernel starts (arguments, checks, plan, output, autograd), with the
launch itself replaced by nothing, so that it needs no GPU; beside it an ``autograd.Function`` that does nothing.
"""

from __future__ import annotations

import contextlib
import json
import platform
import statistics
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import triton
import typer
from rich.console import Console
from rich.table import Table
from triton.runtime.jit import JITFunction

import gpukern.functional as F
from gpukern.runtime.mode import Mode, force_mode


class Empty(torch.autograd.Function):
    """The least a differentiable operation costs: it passes its input on."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


@contextlib.contextmanager
def stubbed_launch() -> Iterator[None]:
    """Take the kernels' path on CPU tensors; a launch does nothing."""
    launch = JITFunction.run
    JITFunction.run = _nothing
    try:
        with force_mode(Mode.KERNELS):
            yield
    finally:
        JITFunction.run = launch


def _nothing(*arguments, **options) -> None:
    pass


def microseconds(call: Callable[[], object], rounds: int = 30, calls: int = 400) -> float:
    """The median over rounds of the mean time of a call, in microseconds."""
    call()
    return statistics.median(timeit.repeat(call, number=calls, repeat=rounds)) / calls * 1e6


def cases() -> dict[str, Callable[[], object]]:
    x = torch.randn(8, 64, 14, 14).half().contiguous(memory_format=torch.channels_last)
    w = torch.randn(64, 64, 3, 3).half().contiguous(memory_format=torch.channels_last)
    b = torch.randn(64).half()
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, w, b)]
    matrix, weight = torch.randn(128, 512).half(), torch.randn(256, 512).half()
    trained = weight.clone().requires_grad_()
    return {
        "empty autograd.Function": lambda: Empty.apply(leaves[0]),
        "conv2d, training": lambda: F.conv2d(*leaves, padding=1),
        "conv2d, inference": lambda: F.conv2d(x, w, b, padding=1),
        "linear, training": lambda: F.linear(matrix, trained),
        "linear, inference": lambda: F.linear(matrix, weight),
        "max_pool2d, training": lambda: F.max_pool2d(leaves[0], 2),
        "max_pool2d, inference": lambda: F.max_pool2d(x, 2),
        "relu, training": lambda: F.relu(leaves[0]),
        "relu, inference": lambda: F.relu(x),
    }


def main(json_path: Annotated[Path | None, typer.Option("--json", help="also write the figures there")] = None) -> None:
    """Measure and print the table."""
    torch.set_num_threads(1)
    with stubbed_launch():
        times = {name: microseconds(call) for name, call in cases().items()}
    empty = times["empty autograd.Function"]
    table = Table(title="Host time of a call, launch stubbed")
    for column, justify in (("call", "left"), ("µs", "right"), ("times empty", "right")):
        table.add_column(column, justify=justify)
    for name, time in times.items():
        table.add_row(name, f"{time:.1f}", f"{time / empty:.1f}")
    Console().print(table)
    if json_path is not None:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
        result = {**versions, "processor": platform.machine(), "microseconds": times}
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
