"""Options that ``gpukern fuse`` and ``gpukern check`` have in common: models, devices, and files that are written."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

# Imports that need torch are made where they are used: the command line's help must not wait for them.
if TYPE_CHECKING:
    import torch

T = TypeVar("T")

DeviceName = Enum("DeviceName", {"cpu": "cpu", "cuda": "cuda"}, type=str)


def checked(name: str, read: Callable[..., T], *given: Any) -> T:
    """Return the result of ``read``; its errors are reported as a wrong use of the parameter ``name``."""
    from gpukern.fusion.errors import SourceError, WeightsError

    try:
        return read(*given)
    except SourceError as problem:
        hint = "--weights" if isinstance(problem, WeightsError) else name
        raise typer.BadParameter(str(problem), param_hint=hint) from None


@contextlib.contextmanager
def told_of_weights() -> Iterator[list[str]]:
    """Collect warnings about the file of weights for the report's notes; other warnings are issued as usual."""
    from gpukern.fusion.errors import WeightsWarning

    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", WeightsWarning)
        yield notes
    for warning in caught:
        if issubclass(warning.category, WeightsWarning):
            notes.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def check_files(
    report: Path | None = None, json: Path | None = None, save: Path | None = None, plot: Path | None = None
) -> None:
    """Check, before minutes of work, that the output files can be written."""
    for option, path in (("--report", report), ("--json", json), ("--save", save), ("--plot", plot)):
        if path is not None and not path.parent.is_dir():
            raise typer.BadParameter(f"there is no folder {path.parent}", param_hint=option)
        if path is not None and path.is_dir():
            raise typer.BadParameter(f"{path} is a folder", param_hint=option)
    if save is not None and save.suffix != ".pt2":
        raise typer.BadParameter(f"{save} does not end in .pt2", param_hint="--save")
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(f"{plot} does not end in .png, .svg or .pdf", param_hint="--plot")


def place_called(name: DeviceName | None) -> torch.device:
    import torch

    available = torch.cuda.is_available()
    if name is DeviceName.cuda and not available:
        raise typer.BadParameter("there is no CUDA device here", param_hint="--device")
    return torch.device("cuda" if available and name is not DeviceName.cpu else "cpu")


def write_file(write: Callable[[Path], Any], path: Path | None, what: str) -> Iterator[tuple[str, bool]]:
    """Write a file and return the outcome in words, and whether it was written; nothing without a ``path``."""
    from gpukern.fusion.errors import FusionError, first_line

    if path is None:
        return
    try:
        write(path)
    except (OSError, FusionError) as problem:
        yield f"{what} could not be written to {path}: {problem}", False
    except Exception as problem:  # torch's writers raise errors of all kinds
        yield f"{what} could not be written to {path}: {first_line(problem)}", False
    else:
        yield f"{what} is in {path}", True
