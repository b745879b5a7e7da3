"""Models by name, weights and reports from files, as given on a command line."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gpukern.fusion.archive import check_archive
from gpukern.fusion.errors import SourceError, WeightsError, WeightsWarning
from gpukern.fusion.report import IN_ARCHIVE, FusionReport
from gpukern.fusion.weights.files import SUFFIXES, read
from gpukern.fusion.weights.load import fill, load_weights
from gpukern.tune.sources import model_called

__all__ = ["SourceError", "WeightsError", "load_model", "load_weights", "saved_report", "shape_called"]

#: Training programs whose checkpoints name what they trained: their format, and what makes a model of the state. From
#: here, not from the file: that shall not choose what code runs.
_TRAINED = {"gpukern models.train checkpoint, version 1": "models.trained:network"}


def load_model(name: str, weights: str | Path | None = None) -> torch.nn.Module:
    """The model called ``name``, in evaluation mode, with the tensors of the file ``weights`` in it.

    ==================================  ============================================================================
    ``name``                            model
    ==================================  ============================================================================
    ``torchvision:resnet50``            ``torchvision.models.get_model``; without ``weights`` they are random
    ``timm:resnet50``                   ``timm.create_model``, the same
    ``package.module:factory``          what ``factory()`` returns; modules of the working directory are found too
    ``model.pt2``                       what ``torch.export.save`` wrote
    ``checkpoint.pt``                   what ``python -m models.train`` trained
    ==================================  ============================================================================

    ``weights``: see :func:`fill`. SourceError for whatever is missing, unknown, broken or does not fit; WeightsError,
    which is one, where ``weights`` are to blame.
    """
    model = _made(name)
    if weights is not None:
        fill(model, weights)
        if getattr(model, "transform_input", None) is False:  # torchvision sets it with its own weights
            warnings.warn(
                f"{name} is made with transform_input=False; torchvision's own weights of it expect True: for those, "
                "name a factory that sets it",
                WeightsWarning,
                stacklevel=2,
            )
    return model.eval()


def _made(name: str) -> torch.nn.Module:
    package, colon, rest = name.partition(":")
    if name.endswith(".pt2"):
        return _exported(Path(name))
    if Path(name).suffix in SUFFIXES:
        return _trained(Path(name))
    if colon and package in _ZOOS:
        return _ZOOS[package](rest)
    if not colon:
        raise SourceError(
            f"{name!r} names no model: expected torchvision:NAME, timm:NAME, package.module:factory, a .pt2 file or a "
            "checkpoint of models.train"
        )
    return _called(name)


def _trained(path: Path) -> torch.nn.Module:
    """Return the model of a checkpoint that names it."""
    try:
        state = read(path)
    except WeightsError as problem:  # here it is the model that is to blame
        raise SourceError(str(problem)) from problem
    maker = _TRAINED.get(state.get("format", "")) if isinstance(state, dict) else None
    if maker is None:
        raise SourceError(
            f"{path} holds weights, and not what to compute with them: "
            f"name the model, as in package.module:factory --weights {path}"
        )
    return _called(maker, state)


def _called(name: str, *arguments: Any) -> torch.nn.Module:
    try:
        return model_called(name, *arguments)
    except ValueError as problem:
        raise SourceError(str(problem)) from problem
    except Exception as problem:  # whatever a factory raises
        raise SourceError(f"{name} fails: {type(problem).__name__}: {problem}") from problem


# ---- model zoos ----------------------------------------------------------------------------------------------------


def _of_torchvision(name: str) -> torch.nn.Module:
    models = _package("torchvision.models", "torchvision")
    return _of_zoo(
        "torchvision", name, models.list_models(), lambda: models.get_model(name, **_no_weights(models, name))
    )


def _no_weights(models: Any, name: str) -> dict[str, None]:
    """Pass None for each argument that means a download: with ``weights=None`` alone, a backbone's are fetched."""
    asked = inspect.signature(models.get_model_builder(name)).parameters
    return {"weights": None, **{each: None for each in asked if each.startswith("weights_")}}


def _of_timm(name: str) -> torch.nn.Module:
    timm = _package("timm", "timm")
    return _of_zoo("timm", name, timm.list_models(), lambda: timm.create_model(name, pretrained=False))


_ZOOS: dict[str, Callable[[str], torch.nn.Module]] = {"torchvision": _of_torchvision, "timm": _of_timm}


def _package(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as problem:  # also one that is there and does not fit the PyTorch that is
        if isinstance(problem, ModuleNotFoundError) and problem.name in (package, module):
            raise SourceError(f"{package} is not installed: pip install {package}") from problem
        why = f"{type(problem).__name__}: {problem}"
        raise SourceError(f"{package} cannot be imported, as when it was built for another PyTorch: {why}") from problem


def _of_zoo(zoo: str, name: str, known: Sequence[str], make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    if name.partition(".")[0] not in known:  # timm's may have ".a1_in1k" for the weights after it
        near = difflib.get_close_matches(name, known)
        hint = f"; there is {', '.join(near)}" if near else ""
        raise SourceError(f"{zoo} has no model {name!r}{hint}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about the zoo's own defaults
            return make()
    except Exception as problem:
        raise SourceError(f"{zoo}:{name} cannot be made: {type(problem).__name__}: {problem}") from problem


# ---- .pt2 ----------------------------------------------------------------------------------------------------------


def _exported(path: Path) -> torch.nn.Module:
    """Restore the modules that the model had when it was exported, so that they have names to report."""
    if _extra(path) is not None:
        raise SourceError(f"{path} is fused already: gpukern explain {path} shows how")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about torch's own format
            return torch.export.unflatten(torch.export.load(path))
    except Exception as problem:  # whatever torch makes of foreign or newer contents
        raise SourceError(f"{path} cannot be loaded: {type(problem).__name__}: {problem}") from problem


def saved_report(path: str | Path) -> FusionReport:
    """The report inside a model that :meth:`FusedModel.save` wrote. SourceError if there is none."""
    text = _extra(Path(path))
    if text is None:
        raise SourceError(f"{path} was not written by gpukern fuse: it holds no report")
    try:
        return FusionReport.from_json(text)
    except ValueError as problem:
        raise SourceError(f"{path} holds a report that cannot be read: {problem}") from problem


def _extra(path: Path) -> str | None:
    """The text of the report in a .pt2 file, None if it has none; SourceError unless it is an intact archive."""
    check_archive(path, ".pt2 file")
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(f"extra/{IN_ARCHIVE}")]
        try:
            return archive.read(names[0]).decode("utf-8") if names else None
        except UnicodeDecodeError as problem:
            raise SourceError(f"{path} holds a report that cannot be read: {problem}") from problem


# ---- inputs --------------------------------------------------------------------------------------------------------


def shape_called(words: str) -> tuple[int, ...]:
    """ "32,3,224,224" or "32x3x224x224"; SourceError for anything but sizes of at least one."""
    parts = re.split(r"\s*[x×,]\s*", words.strip().lower())
    if not all(re.fullmatch(r"[1-9][0-9]{0,8}", part) for part in parts):
        raise SourceError(f"{words!r} is no shape: expected sizes as in 32,3,224,224 or 32x3x224x224")
    return tuple(map(int, parts))
