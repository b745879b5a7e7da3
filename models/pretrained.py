"""Weights that were trained elsewhere, put into a network with another head."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from gpukern.fusion.errors import WeightsError
from gpukern.fusion.weights.files import read
from gpukern.fusion.weights.states import states_in

Tensors = Mapping[str, torch.Tensor]
#: What wrappers put before every name.
_PREFIXES = ("module.", "_orig_mod.", "model.")


@dataclass(frozen=True)
class Loaded:
    """What :func:`load` did: tensors it copied, and those of the head, which stay new."""

    source: str
    copied: int
    #: Name and both shapes, the file's first, of tensors that did not fit.
    head: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    by_order: bool

    def __str__(self) -> str:
        lines = [f"{self.copied} tensors from {self.source}"]
        if self.by_order:
            lines[0] += ", whose names are others: matched by their order and shapes"
        for name, theirs, ours in self.head:
            lines.append(f"{name} is new: {list(theirs)} in the weights, {list(ours)} here")
        return "\n".join(lines)


def head_of(model: nn.Module) -> str:
    """The name of the last linear layer, whose outputs are the classes. ValueError where there is none."""
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    if not names:
        raise ValueError("the network has no linear layer at its end")
    return names[-1]


def replace_head(model: nn.Module, classes: int) -> nn.Linear:
    """Put a new linear layer for so many classes in place of the last one, and return it."""
    name = head_of(model)
    old = model.get_submodule(name)
    assert isinstance(old, nn.Linear)
    new = type(old)(old.in_features, classes, old.bias is not None, old.weight.device, old.weight.dtype)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    return new


def load(model: nn.Module, source: str | Path) -> Loaded:
    """Copy the weights of ``source`` into ``model``, all but those of a head for other classes.

    ``source`` is a file, .safetensors or of ``torch.save`` with a ``state_dict`` anywhere in it; or it is
    ``torchvision:NAME`` or ``timm:NAME``, whose own loaders may download. Where no name agrees, tensors are matched by
    their order, if all shapes but the head's agree. WeightsError, a ValueError, for what does not fit; ``model`` then
    stays as it was.
    """
    own, head = model.state_dict(), head_of(model)
    candidates = _states(source)
    fits = [fit for tensors in candidates if (fit := _matched(own, tensors)) is not None]
    if not fits:
        raise WeightsError(f"{source} does not fit the network: {_why(own, max(candidates, key=len))}")
    tensors, by_order = fits[0]
    wrong = [name for name in own if tensors[name].shape != own[name].shape]
    if others := [name for name in wrong if not name.startswith(f"{head}.")]:
        name = others[0]
        shapes = f"{list(tensors[name].shape)}, not {list(own[name].shape)}"
        raise WeightsError(f"{source} does not fit the network: {name} is {shapes} ({len(others)} such)")
    if wrong:  # a head is new as a whole
        wrong = [name for name in own if name.startswith(f"{head}.")]
    model.load_state_dict({name: own[name] if name in wrong else tensors[name] for name in own})
    new = tuple((name, tuple(tensors[name].shape), tuple(own[name].shape)) for name in wrong)
    return Loaded(str(source), len(own) - len(wrong), new, by_order)


def _states(source: str | Path) -> list[Tensors]:
    package, colon, name = str(source).partition(":")
    if colon and package in ("torchvision", "timm"):
        return [_from_zoo(package, name)]
    found = [state.tensors for state in states_in(read(Path(source)))]
    if not found:
        raise WeightsError(f"{source} holds no state_dict: there are no tensors by name in it")
    return found


def _from_zoo(package: str, name: str) -> Tensors:
    try:
        if package == "timm":
            return importlib.import_module("timm").create_model(name, pretrained=True).state_dict()
        return importlib.import_module("torchvision.models").get_model(name, weights="DEFAULT").state_dict()
    except ModuleNotFoundError as error:
        raise WeightsError(f"{package}:{name}: {package} is not installed: pip install {package}") from error
    except Exception as error:  # unknown names, and whatever a download raises
        raise WeightsError(f"{package}:{name} cannot be loaded: {error}") from error


def _matched(own: Tensors, tensors: Tensors) -> tuple[dict[str, torch.Tensor], bool] | None:
    """``tensors`` under our names, and whether it took their order; None where they are not those of this network."""
    for prefix in ("", *_PREFIXES):
        named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        if own.keys() <= named.keys():
            return {name: named[name] for name in own}, False
    # torch counts batches since 0.4.1, and some files leave that out.
    counted = len(own) == len(tensors)
    names = [name for name in own if counted or not name.endswith("num_batches_tracked")]
    if len(names) != len(tensors):
        return None
    pairs = dict(zip(names, tensors.items(), strict=True))
    head = {name for name in names if name.startswith(f"{names[-1].rpartition('.')[0]}.")}
    for name, (theirs, tensor) in pairs.items():
        same_kind = name.rpartition(".")[2] == theirs.rpartition(".")[2]
        if not same_kind or (tensor.shape != own[name].shape and name not in head):
            return None
    return {name: pairs[name][1] if name in pairs else own[name] for name in own}, True


def _why(own: Tensors, tensors: Tensors) -> str:
    missing = [name for name in own if name not in tensors]
    return f"it holds {len(tensors)} tensors of {len(own)} wanted, and no {missing[0] if missing else '?'}"
