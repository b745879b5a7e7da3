"""Cost of an optimizer step beside PyTorch's: ``python -m bench.optimizers``.

Kernel launches, bytes moved for each parameter, and Python microseconds with the launch replaced by nothing, all
without a GPU. ``--write`` and ``--out`` keep the figures. Step times on a GPU are of the suite ``optimizer``.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import gpukern.optim as optim
from bench.environment import environment
from bench.optimizer_steps import (
    LIMITS,
    LLAMA,
    OPTIMIZERS,
    WAYS,
    Nothing,
    Tensors,
    floor,
    has,
    launches,
    ones,
    operations,
    shapes,
    stubbed_launch,
)
from bench.results import write_text
from gpukern import tables
from gpukern.formatting import MISSING
from gpukern.runtime.records import plain

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = {"ResNet-50": "resnet50", "Llama 1.1B": LLAMA}

#: A row of a table, as the file keeps it; "torch": what PyTorch needs, by way.
Row = dict[str, Any]
_TITLES = {
    "launches": "Launches of a step, {model} (arguments of 4 KB / 32 KB)",
    "bytes": "Bytes for each parameter, fp32",
    "host": "µs of Python a step, launch stubbed: tensors {tensors}, groups {groups}; checked: all gradients are new",
}

# ---- rows -----------------------------------------------------------------------------------------------------------


def _of_torch(name: str, measured: Callable[[str], Any]) -> dict[str, Any]:
    return {way: measured(way) for way in WAYS if has(name, way)}


def count_launches(model: str, name: str) -> Row:
    """Launches of a step; PyTorch's for both limits of a launch's arguments where they matter."""
    sizes = [torch.Size(shape).numel() for shape in shapes(MODELS[model])]
    with stubbed_launch():
        optimizer, _ = ones(name, Tensors([(1,)] * len(sizes)), optim)
        optimizer.step()
        Nothing.launched.clear()
        optimizer.step()

    def of_torch(way: str) -> list[int]:
        found = operations(name, way, len(sizes))
        return sorted({sum(launches(each, sizes, limit) for each in found) for limit in LIMITS}, reverse=True)

    ours = len(Nothing.launched)
    return {"model": model, "optimizer": name, "gpukern": ours, "torch": _of_torch(name, of_torch)}


def count_bytes(name: str) -> Row:
    """Bytes for each parameter, all in float32. "floor": everything read once, and what changes written once."""
    optimizer, _ = ones(name, Tensors([(1,)]), optim)
    with stubbed_launch():
        optimizer.step()
    (part,) = optimizer._step._parts
    states = len(part._variant().states)
    ours = 4 * (2 + states + 1 + states)
    # The pass for the norms reads once more: LARS the parameter and its gradient, LAMB the moments too.
    norms = {"LARS": 8, "LAMB": 4 * (2 + states)}.get(name, 0)

    def of_torch(way: str) -> int:
        return sum(4 * (each.reads + each.writes) for each in operations(name, way, 1) if not each.counts)

    least = floor(name, Tensors([(1,)]))
    return {"optimizer": name, "floor": least, "gpukern": ours + norms, "torch": _of_torch(name, of_torch)}


def time_host(name: str, tensors: int, groups: bool, rounds: int = 200) -> Row:
    """Microseconds of Python. "cached": the gradients are where they were; "checked": all of them are new."""
    of = Tensors([(1,)] * tensors, groups)
    with stubbed_launch():
        optimizer, parameters = ones(name, of, optim)
        cached = microseconds(optimizer.step, rounds)
        others = itertools.cycle([[torch.ones(1) for _ in parameters] for _ in range(3)])

        def renew() -> None:
            for parameter, gradient in zip(parameters, next(others), strict=True):
                parameter.grad = gradient

        checked = microseconds(optimizer.step, rounds, renew)
    of_torch = _of_torch(name, lambda way: microseconds(ones(name, of, torch.optim, way)[0].step, max(10, rounds // 5)))
    about = {"tensors": tensors, "groups": tensors if groups else 1, "optimizer": name}
    return {**about, "cached": cached, "checked": checked, "torch": of_torch}


def microseconds(call: Callable[[], Any], rounds: int, before: Callable[[], None] = lambda: None) -> float:
    """The median of single calls, each after ``before``; of five such, made one after the other, the least: what else
    the machine does only adds."""
    call()
    medians = []
    for _ in range(5):
        found = []
        for _ in range(max(3, rounds // 5)):
            before()
            begin = time.perf_counter()
            call()
            found.append(time.perf_counter() - begin)
        medians.append(statistics.median(found))
    return min(medians) * 1e6


# ---- tables ---------------------------------------------------------------------------------------------------------


def _tables(found: dict[str, list[Row]]) -> Iterator[Table]:
    """One for each title: our own columns, then PyTorch's ways."""
    titled: dict[str, list[Row]] = {}
    for kind, rows in found.items():
        for row in rows:
            titled.setdefault(_TITLES[kind].format(**row), []).append(row)
    for title, rows in titled.items():
        ours = [name for name in ("floor", "gpukern", "cached", "checked") if name in rows[0]]
        table = tables.table("optimizer", *tables.numbers(*ours, *(f"torch {way}" for way in WAYS)), title=title)
        for row in rows:
            values = [*(row[name] for name in ours), *(row["torch"].get(way) for way in WAYS)]
            table.add_row(row["optimizer"], *map(_cell, values))
        yield table


def _cell(value: float | list[int] | None) -> str:
    if isinstance(value, list):
        return " / ".join(map(str, value))
    return MISSING if value is None else f"{value:,.0f}"


def main(
    write: Annotated[bool, typer.Option("--write", help="Write bench/results/host/optimizers.json too.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write that file too.")] = None,
    optimizer: Annotated[list[str], typer.Option(help="Of those in the table; repeatable. All by default.")] = [],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="Steps of which each time is the median.")] = 200,
) -> None:
    """Count, measure and print."""
    torch.set_num_threads(1)
    console = Console()
    names = optimizer or list(OPTIMIZERS)
    if unknown := set(names) - set(OPTIMIZERS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: expected {'; '.join(OPTIMIZERS)}")
    found: dict[str, list[Row]] = {
        "launches": [count_launches(model, name) for model in MODELS for name in names],
        "bytes": [count_bytes(name) for name in names],
        "host": [time_host(name, *what, rounds) for what in ((161, False), (465, True)) for name in names],
    }
    for table in _tables(found):
        console.print(table)
    console.print("torch: with its kernels for tensors of one element, on the CPU.")
    kept = plain({"environment": environment(torch.device("cpu")), **found})
    for path in ([RESULTS / "host" / "optimizers.json"] if write else []) + ([out] if out else []):
        write_text(path, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    typer.run(main)
