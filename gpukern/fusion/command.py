"""``gpukern fuse``, and ``gpukern explain`` of what it saved."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from gpukern.fusion.command_options import DeviceName, check_files, checked, place_called, told_of_weights, write_file
from gpukern.tables import show

# Imports that need torch are made where they are used: the command line's help must not wait for them.
if TYPE_CHECKING:
    import torch

    from gpukern.fusion.model import FusedModel
    from gpukern.fusion.report import FusionReport

#: Dtypes of eight bits, by their names.
_EIGHT_BITS = ("int8", "fp8")
#: Models of these come with random weights.
_ZOOS = ("torchvision:", "timm:")

_Page = Annotated[Path | None, typer.Option("--report", metavar="FILE.html", help="Write the report as a page.")]


def fuse(
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
    dtype: Annotated[
        str,
        typer.Option(
            metavar="KIND", help="What to compute in: fp16, bf16, fp32, int8 or fp8. Default: the model's own."
        ),
    ] = "",
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="DIR|FILE", help="For int8 and fp8: a folder of images, or batches as .npy, .npz or .pt."),
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(metavar="HOW", help="How ranges are taken: auto, max, percentile, mse or entropy. Default: auto."),
    ] = "",
    target: Annotated[
        float | None, typer.Option(help="Agreement that int8 and fp8 must reach on batches kept aside. Default: 0.99.")
    ] = None,
    precision: Annotated[
        str, typer.Option(metavar="KIND", help="What all else is in, for int8 and fp8: fp16 or bf16. Default: fp16.")
    ] = "",
    resize: Annotated[
        int | None, typer.Option(help="Shorter side of images before the crop. Default: the crop is 87.5 % of it.")
    ] = None,
    mean: Annotated[
        str, typer.Option(metavar="R,G,B", help="Subtracted from images in 0 … 1. Default: ImageNet's.")
    ] = "",
    std: Annotated[str, typer.Option(metavar="R,G,B", help="Images are divided by it. Default: ImageNet's.")] = "",
    verify: Annotated[bool, typer.Option(help="Compare with the original in float64.")] = True,
    skip: Annotated[
        list[str], typer.Option(metavar="PATTERN", help='Modules to leave as they are: "head.*". Repeatable.')
    ] = [],  # noqa: B006 - Typer's own copy
    strict: Annotated[bool, typer.Option("--strict", help="Fail where something could not be fused.")] = False,
    channels_last: Annotated[bool, typer.Option(help="Keep images in that layout.")] = True,
    cuda_graph: Annotated[bool, typer.Option(help="Replay the launches as a CUDA graph, also in the timing.")] = False,
    report: _Page = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as JSON.")] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE.pt2", help="Write the fused model, for gpukern.load.")
    ] = None,
    seed: Annotated[int, typer.Option(help="For the example input, and for weights that are not given.")] = 0,
    device: Annotated[DeviceName | None, typer.Option(help="Default: cuda if there is one.")] = None,
) -> None:
    """Fuse a trained network for inference, prove that it computes the same, and say what was fused and what not.

    Exit status 1: it could not be fused, or the result is not right. 2: there is no such model, input or file.
    """
    import torch

    from gpukern.fusion.errors import FusionError, first_line
    from gpukern.fusion.given import check_weights
    from gpukern.fusion.sources import load_model, shape_called

    check_files(report, json, save)
    place, kind = place_called(device), _dtype(dtype, "--dtype", _EIGHT_BITS) if dtype else None
    shapes = [checked("--input", shape_called, each) for each in input]
    given: dict[str, Any] = {"calibration": calibration or None, "target": target}
    given["precision"] = _dtype(precision, "--precision") if precision else None
    given["calibrate"] = _batches(calibrate, shapes, resize, mean, std)
    _check_options(kind, given, verify)
    torch.manual_seed(seed)
    with _step(f"making {model}"), told_of_weights() as notes:
        made = checked("MODEL", load_model, model, weights)
    try:
        check_weights(made)
        made = made.to(place)
        inputs = tuple(torch.randn(shape, device=place) for shape in shapes)
    except FusionError as problem:
        _fail(str(problem))
    except Exception as problem:  # no memory, as a rule
        _fail(f"the model and its input cannot be put on {place}: {first_line(problem)}")
    settings: dict[str, Any] = {"channels_last": channels_last, "cuda_graph": cuda_graph, "verify": verify}
    settings |= {name: value for name, value in given.items() if value is not None}
    steps = ["capture", "fold", *(["verify"] if verify else []), *(["measure"] if place.type == "cuda" else [])]
    # Calibration shows a bar of its own.
    with _step(f"fusing: {', '.join(steps)}") if calibrate is None else contextlib.nullcontext():
        fused, told, failure = _fused(made, inputs, dtype=kind, skip=skip, strict=strict, **settings)
    if model.startswith(_ZOOS) and weights is None:
        notes.append("The weights are random: none were given")
    told = replace(told, model=model, notes=(*told.notes, *notes))
    with _step("writing"):  # before anything is printed: a reader of the pipe may stop early
        written = [*write_file(told.to_html, report, "the report"), *write_file(told.to_json, json, "the report")]
        if fused is not None:
            fused.report = told
            written += write_file(fused.save, save, "the fused model")
    show(told)
    _tell(written)
    if failure:
        _fail(failure)


def explain_model(
    path: Annotated[Path, typer.Argument(metavar="FILE.pt2", help="What gpukern fuse --save wrote.")],
    report: _Page = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """How a saved model was fused. The word "model" may be left out: gpukern explain r50.pt2"""
    from gpukern.fusion.sources import saved_report

    check_files(report)
    found = checked("FILE.pt2", saved_report, path)
    written = list(write_file(found.to_html, report, "the report"))
    if as_json:
        typer.echo(found.to_json(), nl=False)
    else:
        show(found)
    _tell(written)


# ---- what was typed ------------------------------------------------------------------------------------------------


def _dtype(name: str, option: str, others: Sequence[str] = ()) -> Any:
    """The dtype called so, by its short name or torch's; the name itself if it is one of ``others``."""
    import torch

    short = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
    long = short.get(name.lower(), name.lower())
    if long in others:
        return long
    if long not in short.values():
        raise typer.BadParameter(
            f"no dtype is called {name!r}; known are {', '.join([*short, *others])}", param_hint=option
        )
    return getattr(torch, long)


def _batches(path: Path | None, shapes: Sequence[Sequence[int]], resize: int | None, mean: str, std: str) -> Any:
    """What ``--calibrate`` names; None without it."""
    from gpukern.fusion.quantization.files import Preparation, batches_from

    preparation = Preparation(resize, _numbers(mean, "--mean"), _numbers(std, "--std"))
    if path is None:
        if preparation != Preparation():
            raise typer.BadParameter("--resize, --mean and --std are for --calibrate", param_hint="--calibrate")
        return None
    return checked("--calibrate", batches_from, path, shapes, preparation)


def _numbers(words: str, option: str) -> tuple[float, ...] | None:
    try:
        return tuple(map(float, words.split(","))) if words else None
    except ValueError:
        raise typer.BadParameter(f"{words!r} is not numbers between commas", param_hint=option) from None


def _check_options(kind: Any, given: dict[str, Any], verify: bool) -> None:
    """Check what belongs to eight bits before minutes of work."""
    from gpukern.fusion.quantization.settings import OptionError, settings_for

    try:
        settings_for(kind, given, verify)
    except OptionError as problem:
        raise typer.BadParameter(str(problem), param_hint=f"--{problem.option}") from None


# ---- the work ------------------------------------------------------------------------------------------------------


def _fused(
    model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], **settings: Any
) -> tuple[FusedModel | None, FusionReport, str]:
    """Return the fused model and its report; if the verification fails, no model, the report and the error."""
    from gpukern.fusion import fuse as fuse_model
    from gpukern.fusion.errors import FusionError, SourceError, first_line

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings that concern the user are in the report's notes
            fused = fuse_model(model, inputs, **settings)
            return fused, fused.report, ""
    except SourceError as problem:  # a file of the calibration
        raise typer.BadParameter(str(problem), param_hint="--calibrate") from None
    except FusionError as problem:
        if problem.report is not None:
            return None, problem.report, str(problem)
        _require_that_it_runs(model, inputs)
        _fail(str(problem))
    except RuntimeError as problem:  # a CUDA graph without CUDA, no memory
        _fail(str(problem))
    except Exception as problem:  # whatever a model raises when it is called
        _require_that_it_runs(model, inputs)
        _fail(f"the model cannot be fused: {first_line(problem)}")


def _require_that_it_runs(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """Run the unfused model on the input: if it fails, the input is wrong, not the fusion."""
    import torch

    try:
        with torch.no_grad():
            model(*inputs)
    except Exception as problem:  # whatever a model raises
        sizes = " and ".join("×".join(map(str, each.shape)) for each in inputs)
        told = f"the model does not take {sizes}: {type(problem).__name__}: {problem}"
        raise typer.BadParameter(told, param_hint="--input") from None


# ---- what is shown -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _step(words: str) -> Iterator[None]:
    """Show a line with a clock on standard error while the block runs; on a terminal only."""
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(words, total=None)
        yield


def _tell(written: list[tuple[str, bool]]) -> None:
    """Print to standard error: the output is the report alone."""
    for words, good in written:
        typer.echo(words if good else f"gpukern fuse: {words}", err=True)
    if not all(good for _, good in written):
        raise typer.Exit(1)


def _fail(problem: str) -> NoReturn:
    typer.echo(f"gpukern fuse: {problem}", err=True)
    raise typer.Exit(1)
