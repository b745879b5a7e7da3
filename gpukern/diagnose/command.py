"""``gpukern diagnose``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gpukern.fusion.command_options import DeviceName, check_files, checked, place_called, write_file
from gpukern.tables import show

if TYPE_CHECKING:
    import torch


def diagnose(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="FILE.py:NAME, package.module:NAME, torchvision:NAME, timm:NAME or a checkpoint of models.train.",
            show_default=False,
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="FILE.py:NAME or package.module:NAME of (inputs, targets), a loader, a data set, or a function that "
            "returns one; or a .pt file with (inputs, targets).",
        ),
    ],
    loss: Annotated[
        str, typer.Option(metavar="NAME", help="Of torch.nn.functional, or FILE.py:NAME.")
    ] = "cross_entropy",
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A .safetensors file, a state_dict, or a checkpoint with one.")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of torch.optim, or FILE.py:NAME of a function of the model.")
    ] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Learning rate of the optimizer.")] = None,
    weight_decay: Annotated[float | None, typer.Option(min=0, help="Weight decay of the optimizer.")] = None,
    step: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="FILE.py:NAME of training_step(model, optimizer, batch); needs --optimizer."),
    ] = None,
    chance: Annotated[float | None, typer.Option(help="Loss of a model that knows nothing, if not ln C.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="About how many to take of a loader or data set.")] = 256,
    examples: Annotated[int, typer.Option(min=1, help="How many must be learned to the end.")] = 20,
    steps: Annotated[int, typer.Option(min=1, help="In how many steps at most.")] = 200,
    layers: Annotated[
        bool, typer.Option("--layers", help="Also show every layer's activations and gradients.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw a picture: .png, .svg or .pdf.")] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as JSON.")] = None,
    seed: Annotated[int, typer.Option(help="For all random numbers.")] = 0,
    device: Annotated[DeviceName | None, typer.Option(help="Default: cuda if there is one.")] = None,
) -> None:
    """Look for the usual mistakes before a training: in data, loss, layers, gradients and steps.

    Exit status 1: something is wrong, or nothing can be checked. 2: there is no such model, data or file.
    """
    import torch

    from gpukern.diagnose import DiagnoseError, sanity_check
    from gpukern.diagnose.extras import needed
    from gpukern.diagnose.sources import batch_named, loss_named, model_named, object_called, optimizer_named
    from gpukern.fusion.errors import first_line

    check_files(json=json, plot=plot)
    place = place_called(device)
    if step is not None and optimizer is None:
        raise typer.BadParameter("a step needs --optimizer", param_hint="--step")
    torch.manual_seed(seed)
    made = checked("MODEL", model_named, model, weights)
    batch = checked("--data", batch_named, data, samples)
    judge = checked("--loss", loss_named, loss)
    training_step = None if step is None else checked("--step", object_called, step)
    try:
        if plot is not None:
            needed("matplotlib", "--plot")
        made = made.to(place)
        made_optimizer = None
        if optimizer is not None:
            made_optimizer = checked("--optimizer", optimizer_named, optimizer, made, lr, weight_decay)
        with _bar() as progress:
            report = sanity_check(
                made, batch, judge, optimizer=made_optimizer, training_step=training_step, chance=chance,
                examples=examples, steps=steps, seed=seed, progress=progress,
            )  # fmt: skip
        table = _layers(made, batch, judge, place) if layers else None
    except (typer.BadParameter, typer.Exit):
        raise
    except (DiagnoseError, TypeError, ValueError, ImportError) as problem:
        _fail(str(problem))
    except Exception as problem:  # no memory, as a rule
        _fail(f"the model cannot be checked on {place}: {first_line(problem)}")
    written = [*write_file(report.plot, plot, "the picture"), *write_file(report.to_json, json, "the report")]
    if table is not None:
        show(table)
    show(report)
    for words, good in written:
        typer.echo(words if good else f"gpukern diagnose: {words}", err=True)
    if not report.passed or not all(good for _, good in written):
        raise typer.Exit(1)


def _layers(model: torch.nn.Module, batch: Any, loss: Callable[..., Any], place: torch.device) -> Any:
    from gpukern.diagnose import activation_statistics
    from gpukern.diagnose.calling import moved

    inputs, targets = (moved(each, place) for each in batch)
    return activation_statistics(model, inputs, loss, targets=targets, training=True, seed=0)


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    """Show the check and how many are done on standard error, if that is a terminal."""
    console = Console(stderr=True)
    columns = BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def _fail(problem: str) -> None:
    typer.echo(f"gpukern diagnose: {problem}", err=True)
    raise typer.Exit(1)
