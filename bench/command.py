"""The command of a suite: which rows, and where they go."""

# No "from __future__ import annotations": Typer must see the annotations of a function that is made here, closed over
# its suite.

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench import environment, results
from bench.attempt import UNFINISHED
from bench.measure import Method
from bench.peers import PEERS
from bench.report import case_name, count, page, terminal
from bench.report.summary import common_timing
from bench.results import ResultsError, Row
from bench.run import run
from bench.suite import Selection, Suite, Task, tasks

RESULTS = environment.ROOT / "bench" / "results"

#: Other words for values of options.
_SHORT = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "nhwc": "channels_last"}


def fail(message: object) -> NoReturn:
    """One line on standard error, exit status 1."""
    typer.echo(f"bench: {message}", err=True)
    raise typer.Exit(1)


def short(path: Path) -> Path:
    """Return a path as one would type it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def of(suite: Suite) -> Callable[..., None]:
    """The command that measures ``suite``."""
    computations = ", ".join(suite.computations)
    # What is repeated is annotated with lists for typer; as defaults they could be changed.
    usual: Any = suite
    nothing: Any = ()

    def command(
        networks: Annotated[
            list[str], typer.Option("--suite", help="Networks whose layers are taken, or 'all'. Repeatable.")
        ] = usual.networks,
        batches: Annotated[list[int], typer.Option("--batch", min=1, help="Repeatable.")] = usual.batches,
        dtypes: Annotated[
            list[str], typer.Option("--dtype", help="fp16, bf16, tf32, fp32 or 'all'. Repeatable.")
        ] = nothing,
        layouts: Annotated[
            list[str], typer.Option("--layout", help="channels_last, nchw or 'all'. Repeatable.")
        ] = nothing,
        computed: Annotated[list[str], typer.Option("--computation", help=f"{computations}. Repeatable.")] = nothing,
        containing: Annotated[str, typer.Option("--filter", help="Part of a layer or a key, or a whole key.")] = "",
        peers: Annotated[
            list[str], typer.Option("--peers", help=f"{', '.join(PEERS)}, 'all' or 'none'. Repeatable.")
        ] = nothing,
        seconds: Annotated[float, typer.Option(min=0, max=3600, help="Of timing for each candidate of a row.")] = 0.3,
        warm: Annotated[bool, typer.Option("--warm", help="One set of tensors, which may stay in the L2.")] = False,
        out: Annotated[Path, typer.Option(help="Folder of all results.")] = RESULTS,
        resume: Annotated[bool, typer.Option("--resume", help="Leave out rows that the file has.")] = False,
        fresh: Annotated[bool, typer.Option("--fresh", help="Forget what the file has.")] = False,
        minutes: Annotated[float, typer.Option(min=0, help=f"Stop after them, with exit status {UNFINISHED}.")] = float(
            "inf"
        ),
        cpu: Annotated[bool, typer.Option("--cpu", help="No GPU: the reference against torch on the CPU.")] = False,
    ) -> None:
        until = time.monotonic() + 60 * minutes
        if not (cpu or torch.cuda.is_available()):
            fail("no CUDA device here; --cpu tries the harness, and gpukern explain network shows plans and floors")
        # A CPU has no TF32, and compiling for each row takes long there.
        offered = [name for name in suite.dtypes if not (cpu and name == "tf32")]
        usual_dtypes, usual_peers = offered[:1], ["library", "compile", "flaggems"]
        if cpu:
            usual_dtypes, usual_peers = ["float32"], ["library"]
        selection = Selection(
            networks=_networks(suite, networks),
            batches=tuple(dict.fromkeys(batches)),
            dtypes=_chosen("--dtype", dtypes, offered, usual_dtypes),
            # A matrix has no layout, whatever is requested.
            layouts=_chosen("--layout", layouts if any(suite.layouts) else (), suite.layouts, suite.layouts[:1]),
            computations=_chosen("--computation", computed, suite.computations, suite.computations),
            containing=containing,
        )
        try:
            chosen = tasks(suite, selection)
        except RuntimeError as error:  # torch cannot even think of tensors that large
            fail(f"{str(error).splitlines()[0]}: choose a smaller --batch")
        if not chosen:
            fail("no row of this suite fits these options")
        method = Method(_chosen("--peers", peers, PEERS, usual_peers), seconds=seconds)
        method = replace(method, cold=0.0) if warm else method
        device = torch.device("cpu" if cpu else "cuda")
        _measure(suite, chosen, method, device, out, resume=resume, fresh=fresh, until=until)

    command.__doc__ = f"{suite.title}: {computations}."
    return command


def _networks(suite: Suite, given: Iterable[str]) -> tuple[str, ...]:
    try:
        return tuple(dict.fromkeys(name for word in given for name in suite.networks_called(word)))
    except ValueError as error:
        fail(error)


def _chosen(option: str, given: Iterable[str], offered: Iterable[str], usual: Iterable[str]) -> tuple[str, ...]:
    """Return what ``given`` names of ``offered``: all for "all", none for "none"; ``usual`` if nothing is given."""
    offered, given, found = list(offered), list(given), list[str]()
    named = {short: name for short, name in _SHORT.items() if name in offered} | {name: name for name in offered}
    for word in given:
        meant = [name for known, name in named.items() if word.lower() in ("all", known.lower())]
        found += meant
        if not meant and word.lower() not in ("all", "none"):
            fail(f"{option} {word}: expected one of {', '.join(named)}")
    return tuple(dict.fromkeys(found if given else usual))


# ---- measuring -----------------------------------------------------------------------------------------------------


def _measure(suite: Suite, chosen: list[Task], method: Method, device: torch.device, out: Path, **options: Any) -> None:
    name = environment.device_name(device)
    folder = out / environment.run_folder(device)
    path = folder / f"{suite.name}.json"
    typer.echo(f"{suite.title} on {name}: {count(len(chosen), 'row')}", err=True)
    try:
        with _Bar(len(chosen)) as bar:
            outcome = run(suite, chosen, method, device, path, on_row=bar.row, on_compiled=bar.compiled, **options)
        results.write_text(folder / f"{suite.name}.html", page.render([(path, outcome.results)]))
    except (ResultsError, OSError) as error:
        fail(error)
    keys = {task.case.key for task in chosen}
    rows = tuple(row for row in outcome.results.rows if row.case.key in keys)
    terminal.show(replace(outcome.results, rows=rows))
    found = f", {outcome.found} found there" if outcome.found else ""
    typer.echo(f"{count(outcome.measured, 'row')} measured{found}: {short(path)}, page beside it: {suite.name}.html")
    if outcome.stopped:
        typer.echo(f"bench: {count(outcome.left, 'row')} left, {outcome.stopped}; --resume goes on", err=True)
        raise typer.Exit(UNFINISHED)


class _Bar:
    """Progress on standard error, where that is a terminal."""

    def __init__(self, total: int) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        console = Console(stderr=True)
        # Disabled, not only without a terminal: it would still print empty lines.
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._compiling = self._progress.add_task("compiling kernels", total=total, visible=False)
        self._measuring = self._progress.add_task("the device's own limits", total=total)

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def compiled(self, tasks: float) -> None:
        self._progress.update(self._compiling, advance=tasks, visible=True)

    def row(self, task: Task, row: Row | None) -> None:
        if row is None:
            description = f"{case_name(task.case)}, {task.case.computation}"
            self._progress.update(self._measuring, description=description)
        else:
            self._progress.advance(self._measuring)
            if self._progress.disable:
                typer.echo(_one_line(row), err=True)  # for a log


def _one_line(row: Row) -> str:
    """The first candidate and the fastest of the others, in microseconds, in a way of timing that all have."""
    timing = common_timing(*(each for each in row.candidates if each.samples))
    times = {each.name: statistics.median(each.samples[timing]) for each in row.candidates if timing in each.samples}
    first, *others = row.candidates
    fastest = sorted((each for each in others if each.name in times), key=lambda each: times[each.name])
    bad = [each for each in row.candidates if each.status != "ok"]
    said = [f"{each.name} {times[each.name]:.1f}" for each in (first, *fastest[:4]) if each.name in times]
    said += [f"{each.name} {each.status}: {each.message}" for each in bad[:4]]
    return f"{case_name(row.case)}, {row.case.computation}: {', '.join(said)} ({timing}, µs)"
