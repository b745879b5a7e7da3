"""Models, batches, losses, optimizers and steps, as named on a command line."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from gpukern import optim
from gpukern.fusion.errors import SourceError, first_line
from gpukern.fusion.sources import load_model
from gpukern.fusion.weights.load import fill
from gpukern.tune.sources import working_directory_on_path

#: Files that were run, so that a model and its data from one file share its classes.
_files: dict[Path, Any] = {}


def object_called(name: str) -> Any:
    """Return what ``FILE.py:NAME`` or ``package.module:NAME`` is. SourceError if there is none."""
    where, colon, attribute = name.rpartition(":")
    if not colon or not where or not attribute:
        raise SourceError(f"{name!r} names nothing: expected FILE.py:NAME or package.module:NAME")
    try:
        with working_directory_on_path():
            found: Any = _file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
        for part in attribute.split("."):
            if not hasattr(found, part):
                raise SourceError(f"{name} is not there: {where} has no {attribute}")
            found = getattr(found, part)
    except SourceError:
        raise
    except ImportError as problem:
        raise SourceError(f"{name} is not there: {problem}") from problem
    except Exception as problem:  # whatever a user's file raises
        raise SourceError(f"{where} fails: {first_line(problem)}") from problem
    return found


def _file(path: Path) -> Any:
    path = path.resolve()
    if path not in _files:
        if not path.is_file():
            raise SourceError(f"there is no file {path}")
        spec = importlib.util.spec_from_file_location(f"_file_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Dataclasses and pickles look their module up; by a name that hides no other.
        sys.modules[module.__name__] = module
        # As a program has it: files beside it can be imported.
        sys.path.insert(0, str(path.parent))
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(path.parent))
        _files[path] = module
    return _files[path]


def model_named(name: str, weights: Path | None) -> torch.nn.Module:
    """Return the model that ``FILE.py:NAME`` makes or is, or one by any name that ``gpukern check`` takes."""
    where, _, _ = name.rpartition(":")
    if not where.endswith(".py"):
        return load_model(name, weights)
    made = _made(name, object_called(name))
    if not isinstance(made, torch.nn.Module):
        raise SourceError(f"{name} makes a {type(made).__name__}, expected a torch.nn.Module")
    if weights is not None:
        fill(made, weights)
    return made


def _made(name: str, found: Any, *arguments: Any) -> Any:
    if not callable(found) or isinstance(found, torch.nn.Module):
        return found
    try:
        return found(*arguments)
    except Exception as problem:  # whatever a factory raises
        raise SourceError(f"{name} fails: {first_line(problem)}") from problem


def batch_named(name: str, samples: int) -> tuple[Any, Any]:
    """Return (inputs, targets): of a ``.pt`` file with both, or what ``name`` is, or returns.

    Of a loader or a data set about ``samples`` samples. SourceError for anything else.
    """
    if name.endswith((".pt", ".pth")):
        try:
            found = torch.load(name, weights_only=True, map_location="cpu")
        except Exception as problem:  # whatever torch makes of other files
            raise SourceError(f"{name} cannot be read: {first_line(problem)}") from problem
    else:
        found = _made(name, object_called(name))
    if _is_batch(found):
        return found[0], found[1]
    if isinstance(found, torch.utils.data.Dataset) and not isinstance(found, torch.utils.data.IterableDataset):
        found = torch.utils.data.DataLoader(found, batch_size=samples, shuffle=True)
    if not isinstance(found, Iterable):
        raise SourceError(f"{name} is a {type(found).__name__}, expected (inputs, targets), a loader or a data set")
    return _gathered(name, found, samples)


def _is_batch(found: Any) -> bool:
    """Whether it is a pair of inputs and targets, and no list of two batches."""
    if isinstance(found, list):
        return len(found) == 2 and isinstance(found[0], torch.Tensor)
    return isinstance(found, tuple) and len(found) == 2 and any(map(_holds_tensor, found))


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))


def _gathered(name: str, batches: Iterable[Any], samples: int) -> tuple[Any, Any]:
    """Return the first batches as one."""
    taken: list[Any] = []
    number = 0
    try:
        for batch in itertools.islice(batches, 1000):
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise SourceError(f"{name} yields a {type(batch).__name__}, expected pairs (inputs, targets)")
            taken.append(tuple(batch))
            number += next((len(leaf) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor)), samples)
            if number >= samples:
                break
    except SourceError:
        raise
    except Exception as problem:  # whatever a data set raises
        raise SourceError(f"{name} fails: {first_line(problem)}") from problem
    if not taken:
        raise SourceError(f"{name} yields no batch")
    leaves = [pytree.tree_leaves(batch) for batch in taken]
    joined = [
        torch.cat(each) if isinstance(each[0], torch.Tensor) and each[0].dim() else each[0]
        for each in zip(*leaves, strict=True)
    ]
    inputs, targets = pytree.tree_unflatten(joined, pytree.tree_structure(taken[0]))
    return inputs, targets


def loss_named(name: str) -> Callable[[Any, Any], torch.Tensor]:
    """Return a loss of ``torch.nn.functional`` by its name, or one called ``FILE.py:NAME``, a class as its object."""
    if ":" not in name:
        found = getattr(F, name, None)
        if not callable(found):
            raise SourceError(f"torch.nn.functional has no {name!r}: name a loss of it, or FILE.py:NAME")
        return found
    found = object_called(name)
    found = _made(name, found) if isinstance(found, type) else found
    if not callable(found):
        raise SourceError(f"{name} is a {type(found).__name__}, expected a function of output and targets")
    return found


def optimizer_named(
    name: str, model: torch.nn.Module, rate: float | None, decay: float | None
) -> torch.optim.Optimizer:
    """Return an optimizer of torch's or gpukern's by its name, or what ``FILE.py:NAME`` makes of the model."""
    if ":" in name:
        made = _made(name, object_called(name), model)
        if not isinstance(made, torch.optim.Optimizer):
            raise SourceError(f"{name} makes a {type(made).__name__}, expected a torch.optim.Optimizer")
        return made
    known = {
        each.lower(): getattr(place, each)
        for place in (optim, torch.optim)
        for each in dir(place)
        if each[:1].isupper()
    }
    kind = known.get(name.lower())
    if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer):
        raise SourceError(f"torch.optim has no {name!r}: name an optimizer of it, or FILE.py:NAME")
    options: dict[str, Any] = {
        key: value for key, value in (("lr", rate), ("weight_decay", decay)) if value is not None
    }
    try:
        return kind(model.parameters(), **options)  # type: ignore[call-arg]
    except Exception as problem:  # options that it does not have, or refuses
        raise SourceError(f"{name} refuses {options}: {first_line(problem)}") from problem
