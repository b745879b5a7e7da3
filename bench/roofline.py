"""Every layer of a network against the roofline, without a GPU: ``python -m bench.roofline``.

The plan of each layer on a named device, the time that no implementation can beat, the time that the plan cannot beat,
the time it is expected to take, and what its machine code is made of.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from bench import command
from bench.environment import ROOT
from bench.report import micro, ratio
from bench.report.markdown import table as markdown_table
from bench.report.terminal import console, new_table
from bench.results import write_text
from bench.suite import suites
from gpukern.conv import Direction
from gpukern.explain import formatting
from gpukern.explain.compiled import CannotCompile, Compiled, compiled
from gpukern.explain.query import Question, convolution, linear
from gpukern.explain.ranking import Answer, answer
from gpukern.runtime.device import DeviceSpec
from gpukern.version import __version__
from models.zoo import network as find


@dataclass(frozen=True)
class Layer:
    """A layer of a network that has it ``count`` times, and the launch it makes."""

    batch: int
    name: str
    count: int
    problem: str
    question: Question


@dataclass(frozen=True)
class Row:
    """Microseconds of one call; ``registers``, ``spills`` and ``loop`` of its main kernel, None if it was not compiled.

    ``loop`` counts the instructions of one turn of the main loop. ``note`` says why there is no machine code.
    """

    batch: int
    layer: str
    count: int
    problem: str
    plan: str
    launches: int
    expected_us: float
    bound_us: float
    floor_us: float
    bound: str
    registers: int | None = None
    spills: int | None = None
    loop: int | None = None
    note: str = ""


def layers(network: str, batches: Iterable[int], direction: Direction, kind: str, device: DeviceSpec) -> list[Layer]:
    """The network's distinct convolutions and fully-connected layers in channels_last, batch by batch."""
    found = []
    for batch in batches:
        for suite in (suites()["conv"], suites()["linear"]):
            for use, problem in suite.problems(network, batch):
                if suite.applies(problem, direction.value):
                    asked = _asked(suite.name, problem, direction, kind, device)
                    found.append(Layer(batch, use.layer, use.count, suite.describe(problem)[0], asked))
    return found


def _asked(suite: str, problem: Any, direction: Direction, kind: str, device: DeviceSpec) -> Question:
    if suite == "linear":
        return linear(problem.rows, problem.inputs, problem.outputs, direction, kind, device)
    return convolution(problem, direction, kind, True, device)


def row(layer: Layer, compiles: bool) -> Row:
    found = answer(layer.question)
    plain = Row(
        batch=layer.batch,
        layer=layer.name,
        count=layer.count,
        problem=layer.problem,
        plan=formatting.describe_plan(found.chosen.plan, layer.question.direction),
        launches=found.chosen.cost.launches,
        expected_us=found.chosen.seconds * 1e6,
        bound_us=found.chosen.cost.seconds * 1e6,
        floor_us=found.floor.seconds * 1e6,
        bound=found.floor.bound,
    )
    return dataclasses.replace(plain, **_code(found)) if compiles else plain


def _code(found: Answer) -> dict[str, Any]:
    try:
        main = main_kernel(compiled(found.question, found.chosen.plan))
    except CannotCompile as reason:
        return {"note": str(reason)}
    return {"registers": main.registers, "spills": main.spills, "loop": main.loop_length}


def main_kernel(kernels: list[Compiled]) -> Compiled:
    """The one that computes; others copy operands and add partial sums."""
    return next(kernel for kernel in kernels if kernel.kernel.startswith("conv2d_"))


# ---- what is shown -------------------------------------------------------------------------------------------------

_COLUMNS = (
    "layer", "problem", "plan", "launches", "floor µs", "bound µs", "expected µs", "expected / floor", "registers",
    "spills", "loop",
)  # fmt: skip
_WORDS = 3


def by_batch(rows: list[Row]) -> dict[int, list[Row]]:
    return {batch: [row for row in rows if row.batch == batch] for batch in dict.fromkeys(row.batch for row in rows)}


def _cells(row: Row) -> list[str]:
    name = f"{row.layer} ({row.count}×)" if row.count > 1 else row.layer
    code = ("–" if value is None else str(value) for value in (row.registers, row.spills, row.loop))
    times = map(micro, (row.floor_us, row.bound_us, row.expected_us))
    return [name, row.problem, row.plan, str(row.launches), *times, ratio(row.expected_us / row.floor_us), *code]


def summary(rows: list[Row]) -> str:
    """The whole network at one batch size: every layer as often as it has it."""
    floor, bound, expected = (
        sum(row.count * getattr(row, name) for row in rows) for name in ("floor_us", "bound_us", "expected_us")
    )
    times = f"floor {micro(floor)} µs, bound {micro(bound)} µs, expected {micro(expected)} µs"
    return f"All layers: {times}, {expected / floor:.2f} times the floor."


def _title(rows: list[Row]) -> str:
    return f"Batch {rows[0].batch}"


def _show(rows: list[Row], heading: str) -> None:
    to = console()
    to.print(heading)
    for each in by_batch(rows).values():
        table = new_table(_title(each), summary(each), _COLUMNS, left=_WORDS)
        for row in each:
            table.add_row(*_cells(row))
        to.print(table)


def markdown(rows: list[Row], heading: str, versions: str) -> str:
    parts = [
        f"# {heading}",
        "**Predicted, not measured**: made by `python -m bench.roofline` on a machine that needs no GPU. *Floor* is "
        "what no implementation can beat: bytes at the full bandwidth or products at the full rate, whichever takes "
        "longer. *Bound* is what this plan cannot beat: its tiles as they are, in whole waves, and all that it moves. "
        "*Expected* adds what tiles, main loops, latencies and launches are estimated to cost. Registers, spills and "
        "the instructions of one turn of the main loop are read off the compiled code of the main kernel.",
        versions,
    ]
    for each in by_batch(rows).values():
        parts += [f"## {_title(each)}", summary(each), markdown_table(_COLUMNS, map(_cells, each), left=_WORDS)]
    if notes := dict.fromkeys(row.note for row in rows if row.note):
        parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def _versions() -> str:
    found = [f"gpukern {__version__}"]
    for package in ("torch", "triton"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found) + "."


# ---- command -------------------------------------------------------------------------------------------------------


def _rows(asked: list[Layer], compiles: bool) -> Iterator[Row]:
    waiting = Console(stderr=True)
    with Progress(
        *Progress.get_default_columns(), MofNCompleteColumn(), console=waiting, disable=not waiting.is_terminal
    ) as bar:
        for layer in bar.track(asked, description="compiling" if compiles else "planning"):
            yield row(layer, compiles)


def _read(name: str, reader: Callable[[str], Any], given: str) -> Any:
    try:
        return reader(given)
    except (KeyError, ValueError) as error:
        raise typer.BadParameter(str(error.args[0]), param_hint=name) from None


def main(
    network: Annotated[str, typer.Option(help="One of the networks of models/zoo.py.")] = "resnet50",
    batch: Annotated[list[int], typer.Option(min=1, help="Repeatable.")] = [1, 32, 128],  # noqa: B006 - Typer's copy
    device: Annotated[str, typer.Option(help="A device or architecture of gpukern explain.")] = "h100",
    dtype: Annotated[str, typer.Option(help="fp16, bf16, tf32 or fp32.")] = "fp16",
    direction: Annotated[str, typer.Option(help="forward, input-grad or weight-grad.")] = "forward",
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Write docs/roofline-NETWORK-DEVICE.md too.")] = False,
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Predict only.")] = False,
) -> None:
    """Every layer of a network against the roofline of a device that need not be here."""
    made = _read("--network", find, network)
    on, kind = _read("--device", formatting.device_called, device), _read("--dtype", formatting.kind_called, dtype)
    directions = _read("--direction", formatting.directions_called, direction)
    if len(directions) > 1:
        raise typer.BadParameter("one at a time", param_hint="--direction")
    heading = f"{made.title} on {on.name}: {directions[0].value}, {kind}, channels_last"
    asked = layers(network, dict.fromkeys(batch), directions[0], kind, on)
    rows = list(_rows(asked, compiles=not no_compile))
    text = markdown(rows, heading, _versions())
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(row) for row in rows], indent=1, ensure_ascii=False))
    elif as_markdown:
        typer.echo(text, nl=False)
    else:
        _show(rows, heading)
    if write:
        path = ROOT / "docs" / document(network, on, directions[0], kind)
        try:
            write_text(path, text)
        except OSError as error:
            command.fail(error)
        typer.echo(f"written: {command.short(path)}", err=True)


def document(network: str, device: DeviceSpec, direction: Direction, kind: str) -> Path:
    """The name says what is not the default."""
    parts = ["roofline", network, *device.name.lower().split()]
    if direction is not Direction.FORWARD:
        parts += direction.value.split()
    if kind != "float16":
        parts.append(kind)
    return Path("-".join(parts) + ".md")


if __name__ == "__main__":
    typer.run(main)
