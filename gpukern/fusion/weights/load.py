"""Filling a model from a file."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gpukern.fusion.errors import WeightsError, WeightsWarning
from gpukern.fusion.weights.files import read
from gpukern.fusion.weights.foreign import listed
from gpukern.fusion.weights.names import Fit, completed, fits, is_auxiliary, missing, plain, unwrapped
from gpukern.fusion.weights.states import State, is_averaged, rank, states_in, unnamed_averages, without


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The ``state_dict`` in a file, on the CPU: .safetensors, or what ``torch.save`` wrote.

    Of a training program's checkpoint it is the averaged state (``model_ema``), else the one of the likeliest name
    (``model_state_dict``, ``state_dict``, ``model``, ``net``, …); ``module.`` and ``_orig_mod.``, which
    DistributedDataParallel and torch.compile put into names, are taken out. WeightsError for anything else. Nothing
    but tensors and plain values is unpickled.
    """
    path = Path(path)
    found = _states(read(path), path)
    chosen = min(found, key=lambda state: (not is_averaged(".".join(state.path)), rank(".".join(state.path))))
    return plain(chosen.tensors)


def fill(model: torch.nn.Module, path: str | Path) -> None:
    """Copy the tensors of a file into ``model``, whichever layout the file has; see :func:`load_weights`.

    Prefixes that all of the model's names have in the file are taken off, as Lightning's ``model.``. WeightsWarning
    where the file holds more than was taken: averaged weights beside others, other networks. WeightsError where it
    does not fit, or where several states do and none is the obvious one.
    """
    path = Path(path)
    own, held = model.state_dict(), read(path)
    found = [fit for state in _states(held, path) for fit in fits(state, own)]
    whole = [fit for fit in found if _is_whole(fit, own)]
    if whole:
        chosen = _choose(whole, path)
    else:
        closest = min(found, key=lambda fit: (len(fit.missing), len(fit.tensors), rank(fit.label)))
        chosen = completed(closest, own)
        if chosen is not closest:
            _warn(f"{path}: {closest.label!r} was taken, and of other parts: {listed(closest.missing)}")
    _copy(model, own, chosen, path)
    _tell(chosen, found, own, path)
    if lists := list(unnamed_averages(held)):
        _warn(f"{path}: averaged weights that are a list, without names, were not taken: {listed(lists)}")


def _states(held: Any, path: Path) -> list[State]:
    found = states_in(held)
    if not found:
        raise WeightsError(f"{path} holds no state_dict: expected tensors by name, and there is {without(held)}")
    return found


# ---- which -------------------------------------------------------------------------------------------------------


def _is_whole(fit: Fit, own: Mapping[str, torch.Tensor]) -> bool:
    return not fit.missing and all(_same_size(own[name], held) for name, held in fit.tensors.items() if name in own)


def _choose(whole: Sequence[Fit], path: Path) -> Fit:
    """The averaged one; else that of the likeliest name."""
    averaged = [fit for fit in whole if is_averaged(fit.label)]
    first, *rest = sorted(averaged or whole, key=lambda fit: rank(fit.label))
    rivals = [fit for fit in rest if averaged or rank(fit.label) == rank(first.label)]
    if any(not _equal(first, fit) for fit in rivals):
        labels = listed([repr(fit.label) for fit in (first, *rivals)])
        raise WeightsError(
            f"{path} holds {len(rivals) + 1} states that fit the model, {labels}: write the one that is meant to a "
            "file of its own"
        )
    return first


def _equal(one: Fit, other: Fit) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(held, other.tensors[name]) for name, held in one.tensors.items()
    )


def _tell(chosen: Fit, found: Sequence[Fit], own: Collection[str], path: Path) -> None:
    """Warn of states left in the file that may have been meant."""
    taken = repr(chosen.label) if chosen.label else "the tensors at the top"
    beside: dict[str, None] = {}
    for fit in found:
        if fit.state is not chosen.state and (not fit.missing or is_averaged(fit.label)):
            beside[".".join(fit.state.path)] = None
        elif fit is not chosen and not fit.missing:
            beside[fit.label] = None
    if beside:
        of = " (averaged weights)" if is_averaged(chosen.label) else ""
        _warn(f"{path}: {taken}{of} was taken, and not {listed([repr(label) for label in beside])}")
    # What else the model has no such name for, its own hooks of loading have renamed, or it would have been refused.
    others = [*chosen.others, *(name for name in chosen.tensors if name not in own and is_auxiliary(name))]
    if others:
        of = f" of {taken}" if chosen.label else ""
        _warn(f"{path}: left out{of}: {listed(others)}")


def _warn(words: str) -> None:
    warnings.warn(words, WeightsWarning, stacklevel=4)


# ---- into the model ------------------------------------------------------------------------------------------------


def _copy(model: torch.nn.Module, own: Mapping[str, torch.Tensor], fit: Fit, path: Path) -> None:
    wrong = [
        f"{name} is {problem}"
        for name, held in fit.tensors.items()
        if name in own and (problem := _misfit(own[name], held))
    ]
    if wrong:
        raise WeightsError(f"{path} does not fit the model: {listed(wrong)}")
    state = OrderedDict(fit.tensors)
    state._metadata = _versions(model, fit)  # type: ignore[attr-defined]
    try:
        lacking, unexpected = model.load_state_dict(state, strict=False)
    except Exception as problem:  # RuntimeError, and modules' own errors for formats they do not support
        raise WeightsError(f"{path} does not fit the model: {problem}") from problem
    lacking = [name for name in lacking if name in missing(own, fit.tensors)]
    unexpected = [name for name in unexpected if not is_auxiliary(name)]
    lines = [f"{words}: {listed(names)}" for words, names in (("missing", lacking), ("unknown", unexpected)) if names]
    if lines:
        raise WeightsError(f"{path} does not fit the model; {'; '.join(lines)}")


def _versions(model: torch.nn.Module, fit: Fit) -> dict:
    """Return format versions by the model's names. Files without any (.safetensors, renamed) count as today's."""
    own = dict(getattr(model.state_dict(), "_metadata", {}))
    if fit.state.versions is None:
        return own
    told = {unwrapped(name): held for name, held in fit.state.versions.items()}
    return {name: told.get((fit.prefix + unwrapped(name)).rstrip("."), held) for name, held in own.items()}


def _same_size(own: object, held: torch.Tensor) -> bool:
    return not isinstance(own, torch.Tensor) or torch.nn.parameter.is_lazy(own) or own.shape == held.shape


def _misfit(own: object, held: torch.Tensor) -> str:
    """Return the reason why the values of ``held`` do not fit the model, "" if they do."""
    if not _same_size(own, held):
        return f"{_by(held)}, the model's {_by(own)}"
    if not isinstance(own, torch.Tensor):
        return ""
    if held.is_meta:
        return "on the meta device: the file holds no values"
    if held.layout != own.layout:
        return f"of layout {held.layout}, the model's {own.layout}"
    kind = str(held.dtype).removeprefix("torch.")
    if own.is_floating_point() and not held.is_floating_point():
        # Copied they would become other numbers without a word: what they mean is in scales beside them.
        return f"{kind}, the model's {str(own.dtype).removeprefix('torch.')}: quantized weights are not read"
    return ""


def _by(tensor: Any) -> str:
    return "×".join(map(str, tensor.shape)) or "a number"
