"""``gpukern tune``."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from gpukern.explain.formatting import directions_called, layer_kind_called, sizes_called
from gpukern.explain.query import QUANTIZED_KINDS
from gpukern.tune import sources
from gpukern.tune.record import Call
from gpukern.tune.session import TuneError, check_device, tune_calls

#: The exit status of a run that left problems for another time (EX_TEMPFAIL of sysexits.h).
UNFINISHED = 75


def tune(
    model: Annotated[
        str,
        typer.Option(metavar="MODULE:FACTORY", help="The function that makes a model, torchvision.models:resnet50."),
    ] = "",
    input: Annotated[str, typer.Option(metavar="NxCxHxW", help="The sizes of the model's input.")] = "",
    layer: Annotated[
        list[str],
        typer.Option("--layer", metavar="LAYER", help='"32x64x56x56 64x3x3 --stride 2 --padding 1". Repeatable.'),
    ] = [],  # noqa: B006 - Typer's own copy
    layers: Annotated[list[Path], typer.Option(metavar="FILE", help="A JSON list of such layers. Repeatable.")] = [],  # noqa: B006
    batch: Annotated[str, typer.Option(help="Batch sizes in place of the given one, 1,32,128.")] = "",
    dtype: Annotated[str, typer.Option(help="Any of fp16, bf16, tf32, fp32; of layers' forward int8, fp8.")] = "fp16",
    direction: Annotated[str, typer.Option(help="Any of forward, input-grad, weight-grad, or all.")] = "all",
    nchw: Annotated[bool, typer.Option("--nchw", help="Tensors in NCHW instead of channels_last.")] = False,
    device: Annotated[int, typer.Option(min=0, help="The number of the GPU.")] = 0,
    budget: Annotated[
        float,
        typer.Option(
            metavar="MINUTES", min=0, help=f"Begin no layer after so many; exit status {UNFINISHED} if any are left."
        ),
    ] = float("inf"),
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Default: $GPUKERN_PLANS, else ~/.cache/gpukern/plans.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure also what has been, with these versions.")] = False,
) -> None:
    """Measure every plan of a model's convolutions on this GPU, and keep the fastest for all calls to come.

    Each plan's result is checked before it is timed. After an interruption the same command goes on.
    """
    try:
        place = _gpu(device)
        asked = _asked(model, input, layer, layers, batch, dtype, direction, not nchw, place)
        report = tune_calls(asked, place, folder=output, minutes=budget, again=again)
    except TuneError as problem:
        typer.echo(f"gpukern tune: {problem}", err=True)
        raise typer.Exit(1) from None
    Console(soft_wrap=True).print(report)
    if report.failed:
        raise typer.Exit(1)
    if report.left:
        raise typer.Exit(UNFINISHED)


def _gpu(number: int) -> torch.device:
    count = torch.cuda.device_count()
    device = torch.device("cuda", number) if torch.cuda.is_available() else torch.device("cpu")
    check_device(device, None)
    if number >= count:
        raise TuneError(f"there is no GPU {number}, only {count} of them")
    return device


def _asked(
    model: str,
    input: str,
    layers: list[str],
    files: list[Path],
    batch: str,
    dtype: str,
    direction: str,
    channels_last: bool,
    device: torch.device,
) -> list[Call]:
    """Every call that the options name, in their order; typer.BadParameter for options that make no sense."""
    with _in("--layer"):
        problems = [sources.layer_called(words) for words in layers]
    with _in("--layers"):
        problems += [problem for file in files for problem in sources.layers_in(file)]
    with _in("--batch"):
        batches: list[int | None] = [sizes_called(word, 1)[0] for word in _listed(batch)] or [None]
    with _in("--dtype"):
        kinds = [layer_kind_called(word) for word in _listed(dtype)]
        if model and set(kinds) & set(QUANTIZED_KINDS):
            raise ValueError("int8 and fp8 are for layers: --layer or --layers")
    with _in("--direction"):
        directions = list(dict.fromkeys(each for word in _listed(direction) for each in directions_called(word)))
    if bool(model) != bool(input):
        raise typer.BadParameter("--model and --input go together")
    if not model and not problems:
        raise typer.BadParameter("nothing to tune: --model with --input, --layer or --layers says what")
    with _in("--input"):
        shape = sizes_called(input, 2, 4) if input else ()
    with _in("--model"):
        made = sources.model_called(model) if model else None
    calls: list[Call] = []
    for kind, size in itertools.product(kinds, batches):
        for problem in problems:
            resized = sources.with_batch(problem, size)
            calls += sources.calls_of_layer(resized, kind, channels_last, directions)
        if made is not None:
            image = (size or shape[0], *shape[1:])
            calls += sources.calls_of_model(made, image, kind, channels_last, directions, device)
    return calls


def _listed(words: str) -> list[str]:
    return [word.strip() for word in words.split(",") if word.strip()]


@contextlib.contextmanager
def _in(option: str) -> Iterator[None]:
    """Report errors inside the block as errors of ``option``."""
    try:
        yield
    except (OSError, ValueError) as problem:
        raise typer.BadParameter(str(problem), param_hint=option) from None
