"""Python's time for a training step, launches stubbed: ``python -m bench.training_step.host``.

Forward and backward of a network by ``gpukern.convert`` and by ``torch.compile(backend="gpukern")``, whose steps take
turns in one process. What a GPU would compute is not; autograd and allocations on the CPU are in the time.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer

import gpukern
from bench.host_overhead import stubbed_launch
from gpukern import tables
from gpukern.compiler import backend
from gpukern.formatting import milli, ratio
from models.zoo import network


def main(
    name: Annotated[str, typer.Option("--network", help="Of models/zoo.py.")] = "resnet18",
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each.")] = 100,
) -> None:
    """Time the host's part of a training step, without a GPU."""
    try:
        model = network(name).make().half().to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    torch.set_num_threads(1)
    compiled: Any = torch.compile(copy.deepcopy(model), backend=backend.gpukern)
    steps = {"gpukern.convert": _step(gpukern.convert(model)), 'torch.compile(backend="gpukern")': _step(compiled)}
    taken: dict[str, list[float]] = {each: [] for each in steps}
    with stubbed_launch():
        for step in steps.values():
            for _ in range(5):
                step()
        for _ in range(rounds):
            for each, step in steps.items():
                start = time.process_time()
                step()
                taken[each].append(time.process_time() - start)
    first, second = taken.values()
    made = tables.table("", *tables.numbers("median of a step"), title=f"{network(name).title}, forward and backward")
    for each, seconds in taken.items():
        made.add_row(each, milli(statistics.median(seconds)))
    tables.show(made)
    ratios = sorted(b / a for a, b in zip(first, second, strict=True))
    print(f"compiled / converted: {ratio(statistics.median(ratios))} (median over rounds)")


def _step(model: torch.nn.Module) -> Callable[[], None]:
    images = torch.zeros(2, 3, 64, 64, dtype=torch.half).to(memory_format=torch.channels_last)

    def step() -> None:
        output = model(images)
        output.backward(torch.zeros_like(output))
        model.zero_grad()

    return step


if __name__ == "__main__":
    typer.run(main)
