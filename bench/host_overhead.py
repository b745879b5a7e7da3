"""Host microseconds of one call, up to the launch: ``python -m bench.host_overhead``.

Everything that gpukern does in Python before a kernel starts (arguments, checks, plan, output, autograd), with the
launch itself replaced by nothing, so that it needs no GPU; beside it an ``autograd.Function`` that does nothing.
``--against CHECKOUT`` compares with another checkout of gpukern: this file times both, in processes that take turns.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable, Iterator, Sequence
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
    JITFunction.run = lambda *arguments, **options: None
    try:
        with force_mode(Mode.KERNELS):
            yield
    finally:
        JITFunction.run = launch


def cases() -> dict[str, Callable[[], object]]:
    x = torch.randn(8, 64, 14, 14).half().contiguous(memory_format=torch.channels_last)
    w = torch.randn(64, 64, 3, 3).half().contiguous(memory_format=torch.channels_last)
    b = torch.randn(64).half()
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, w, b)]
    matrix, weight = torch.randn(128, 512).half(), torch.randn(256, 512).half()
    trained = weight.clone().requires_grad_()
    return {
        "empty autograd.Function": lambda: Empty.apply(leaves[0]),
        "conv2d, training": lambda: F.conv2d(leaves[0], leaves[1], leaves[2], padding=1),
        "conv2d, inference": lambda: F.conv2d(x, w, b, padding=1),
        "linear, training": lambda: F.linear(matrix, trained),
        "linear, inference": lambda: F.linear(matrix, weight),
        "max_pool2d, training": lambda: F.max_pool2d(leaves[0], 2),
        "max_pool2d, inference": lambda: F.max_pool2d(x, 2),
        "relu, training": lambda: F.relu(leaves[0]),
        "relu, inference": lambda: F.relu(x),
    }


def measure(rounds: int = 60, calls: int = 200) -> dict[str, float]:
    """The microseconds of every case: of rounds that alternate between the cases, the fastest.

    What else the machine does only ever adds to a time, and it adds for longer than a round takes.
    """
    torch.set_num_threads(1)
    with stubbed_launch():
        timers = {name: timeit.Timer(call) for name, call in cases().items()}
        timed = [{name: timer.timeit(calls) / calls * 1e6 for name, timer in timers.items()} for _ in range(rounds)]
    return _fastest(timed)


def take_turns(checkouts: list[Path], turns: int) -> list[dict[str, float]]:
    """:func:`measure` for each checkout, the fastest of ``turns`` processes."""
    timed = [[_in_process(checkout) for checkout in checkouts] for _ in range(turns)]
    return [_fastest(runs) for runs in zip(*timed, strict=True)]


def _fastest(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: min(run[name] for run in runs) for name in runs[0]}


def _in_process(checkout: Path) -> dict[str, float]:
    """Return this file's measurement of the gpukern in ``checkout``."""
    run = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "times.json")
        command = [sys.executable, "-c", run, __file__, "--json", str(written)]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL)
        return json.loads(written.read_text())["microseconds"]


def show(measured: dict[str, dict[str, float]]) -> None:
    """Print a table of each call's time, as it is and in units of the empty function, in every column measured."""
    table = Table("call", title="Host time of a call, launch stubbed")
    for name in measured:
        table.add_column(f"{name}, µs".removeprefix(", "), justify="right")
        table.add_column("times empty", justify="right")
    for call in next(iter(measured.values())):
        pairs = [(times[call], times[call] / times["empty autograd.Function"]) for times in measured.values()]
        table.add_row(call, *(f"{number:.1f}" for pair in pairs for number in pair))
    Console().print(table)


def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="also write the figures there")] = None,
    against: Annotated[Path | None, typer.Option(help="another checkout, timed in turn with this one")] = None,
    turns: Annotated[int, typer.Option(help="how often each checkout is timed")] = 9,
) -> None:
    """Measure and print the table."""
    if against is None:
        times = measure()
        show({"": times})
    else:
        here = Path(__file__).resolve().parents[1]
        before, times = take_turns([against.resolve(), here], turns)
        show({"before": before, "after": times})
    if json_path is not None:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
        result = {**versions, "processor": platform.machine(), "microseconds": times}
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
