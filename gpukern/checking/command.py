"""``gpukern check``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gpukern.fusion.command_options import (
    DeviceName,
    check_files,
    checked,
    place_called,
    told_of_weights,
    write_file,
)
from gpukern.tables import show


def check(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="torchvision:NAME, timm:NAME, package.module:factory, a .pt2 file, or a checkpoint of models.train.",
            show_default=False,
        ),
    ],
    input: Annotated[
        list[str], typer.Option(metavar="N,C,H,W", help="The sizes of an input. Repeatable, for several.")
    ],
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A .safetensors file, a state_dict, or a checkpoint with one.")
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="KIND", help="fp16, bf16, tf32 or fp32.")] = "fp32",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Keep images in that layout.")] = False,
    train: Annotated[bool, typer.Option("--train/--eval", help="The mode of the model.")] = True,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.html", help="Write the report as a page, with a picture.")
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as JSON.")] = None,
    seed: Annotated[int, typer.Option(help="For the input, gradients, and weights that are not given.")] = 0,
    device: Annotated[DeviceName | None, typer.Option(help="Default: cuda if there is one.")] = None,
) -> None:
    """Compare a model and every gradient, by gpukern and by torch, with float64, layer by layer.

    Exit status 1: a layer leaves its bound, or nothing can be checked. 2: there is no such model, input or file.
    """
    from dataclasses import replace

    import torch

    from gpukern.checking import CheckError
    from gpukern.checking import check as check_model
    from gpukern.explain.formatting import kind_called
    from gpukern.explain.query import KINDS
    from gpukern.fusion.errors import first_line
    from gpukern.fusion.sources import load_model, shape_called
    from gpukern.runtime.precision import fp32_products

    check_files(report, json)
    place = place_called(device)
    kind, precision = KINDS[_kind(dtype, kind_called)]
    shapes = [checked("--input", shape_called, each) for each in input]
    torch.manual_seed(seed)
    with _bar() as progress:
        progress(f"making {model}", 0, 1)
        with told_of_weights() as notes:
            made = checked("MODEL", load_model, model, weights)
        try:
            made = made.to(place)
            inputs = tuple(torch.randn(shape, device=place) for shape in shapes)
            with fp32_products(precision, precision):
                found = check_model(
                    made, inputs, dtype=kind, channels_last=channels_last, training=train, seed=seed, progress=progress
                )
        except CheckError as problem:
            _fail(str(problem))
        except Exception as problem:  # no memory, as a rule
            _fail(f"the model cannot be checked on {place}: {first_line(problem)}")
    found = replace(found, model=model, notes=(*found.notes, *notes))
    written = [*write_file(found.to_html, report, "the report"), *write_file(found.to_json, json, "the report")]
    show(found)
    for words, good in written:
        typer.echo(words if good else f"gpukern check: {words}", err=True)
    if not found.passed or not all(good for _, good in written):
        raise typer.Exit(1)


def _kind(name: str, read: Callable[[str], str]) -> str:
    try:
        return read(name)
    except ValueError as problem:
        raise typer.BadParameter(str(problem), param_hint="--dtype") from None


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    """Show the step and how many are done on standard error, if that is a terminal."""
    console = Console(stderr=True)
    columns = BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def _fail(problem: str) -> None:
    typer.echo(f"gpukern check: {problem}", err=True)
    raise typer.Exit(1)
