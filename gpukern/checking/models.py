"""The three copies of a model that are compared, and their layers."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import gpukern.nn
from gpukern.checking.errors import CheckError
from gpukern.convert import REPLACEMENTS, convert
from gpukern.formatting import count
from gpukern.fusion.errors import FusionError
from gpukern.fusion.given import check_weights, duplicate
from gpukern.nn.leaf import derived_from
from gpukern.runtime.mode import Mode, force_mode

_TORCHS = {ours: torchs for torchs, ours in REPLACEMENTS.items()}
#: Layers of torchvision and timm that drop whole samples.
DROPPING = ("StochasticDepth", "DropPath")


@dataclass(frozen=True)
class Unit:
    """A layer that is judged, or neighbours that gpukern computes as one: their dotted names."""

    names: tuple[str, ...]
    type: str
    #: why torch computes it, "" if gpukern does
    reason: str = ""

    @property
    def name(self) -> str:
        first, *others = self.names
        return " + ".join([first or "(the model)", *(name.rpartition(".")[2] for name in others)])

    def module(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return the layer of a copy of the model. Neighbours run as they do in a Sequential of the copy's kind."""
        layers = [model.get_submodule(name) for name in self.names]
        if len(layers) == 1:
            return layers[0]
        ours = any(type(layer).__module__.startswith("gpukern.nn") for layer in layers)
        return (gpukern.nn.Sequential if ours else torch.nn.Sequential)(*layers)

    def parameter(self, inner: str) -> str:
        """Return the model's name of a parameter or buffer that :meth:`module` calls ``inner``."""
        owner = self.names[0]
        if len(self.names) > 1:
            number, _, inner = inner.partition(".")
            owner = self.names[int(number)]
        return f"{owner}.{inner}" if owner else inner


@dataclass
class Models:
    """``ours`` and ``torchs`` in the dtype, ``exact`` in float64 with the same, rounded, weights."""

    exact: torch.nn.Module
    torchs: torch.nn.Module
    ours: torch.nn.Module
    units: list[Unit]
    notes: list[str] = field(default_factory=list)


def prepare(model: torch.nn.Module, dtype: torch.dtype, channels_last: bool, training: bool) -> Models:
    """Copy ``model`` three times. CheckError if it has no copy, or lacks its weights."""
    try:
        check_weights(model)
        torchs = duplicate(model)
    except FusionError as problem:
        raise CheckError(str(problem).replace("fuse() takes", "check() takes")) from problem
    torchs.train(training)
    notes = _without_dropout(torchs) if training else []
    _to_torchs_layers(torchs)
    torchs.to(dtype)
    if channels_last:
        for tensor in (*torchs.parameters(), *torchs.buffers()):
            tensor.data = packed(tensor.data)
    for parameter in torchs.parameters():
        parameter.grad = None
    ours, report = convert(duplicate(torchs), inplace=True, return_report=True)
    units = [Unit((name,), kind) for name, kind in (*report.replaced, *report.already)]
    units += [Unit((name,), kind, reason) for name, kind, reason in report.left]
    together = [group for group in report.together if _occur_once(ours, group.names)]
    grouped = {name for names, _ in together for name in names}
    units = [unit for unit in units if unit.names[0] not in grouped]
    units += [Unit(names, " + ".join(types)) for names, types in together]
    order = {name: number for number, (name, _) in enumerate(torchs.named_modules())}
    units.sort(key=lambda unit: order[unit.names[0]])
    return Models(duplicate(torchs).double(), torchs, ours, units, notes)


def _occur_once(model: torch.nn.Module, names: tuple[str, ...]) -> bool:
    """Whether these layers have one place in the model each: calls elsewhere would be taken for the neighbours'."""
    places = Counter(child for module in model.modules() for child in module._modules.values())
    return all(places[model.get_submodule(name)] == 1 for name in names)


def _to_torchs_layers(model: torch.nn.Module) -> None:
    """Undo :func:`gpukern.convert`, which changed nothing but classes."""
    for module in model.modules():
        kind = type(module)
        if isinstance(module, gpukern.nn.Sequential):
            module.__class__ = derived_from(kind) or torch.nn.Sequential  # type: ignore[assignment]
        elif kind in _TORCHS:
            module.__class__ = _TORCHS[kind]
            vars(module).pop("__module__", None)
        elif theirs := derived_from(kind):
            module.__class__ = theirs
            vars(module).pop("__module__", None)


def _without_dropout(model: torch.nn.Module) -> list[str]:
    """Put layers that drop at random into evaluation mode; return a note of it."""
    number = 0
    for module in model.modules():
        if isinstance(module, _DropoutNd) or type(module).__name__ in DROPPING:
            module.eval()
            number += 1
        elif isinstance(getattr(module, "dropout", None), float):  # attention, recurrent layers
            module.dropout = 0.0  # type: ignore[assignment]
    return [f"dropout and stochastic depth are off: {count(number, 'layer')}"] if number else []


class NoDropout(TorchFunctionMode):
    """Turns calls of dropout functions into copies; ``happened``: whether there was one."""

    happened = False
    _dropping = frozenset(
        getattr(torch.nn.functional, name)
        for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
    )

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._dropping:
            given = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
            if given.get("training", True) and given.get("p", 0.5):
                self.happened = True
                return given["input"] * 1
        if func is torch.nn.functional.scaled_dot_product_attention and (kwargs.get("dropout_p") or any(args[4:5])):
            self.happened = True
            args = (*args[:4], *[0.0] * len(args[4:5]), *args[5:])
            kwargs |= {"dropout_p": 0.0} if len(args) < 5 else {}
        return func(*args, **kwargs)


def packed(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in channels_last if it has the dimensions of images or volumes."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if tensor.dim() not in formats or not tensor.is_floating_point():
        return tensor
    return tensor.contiguous(memory_format=formats[tensor.dim()])


@contextlib.contextmanager
def in_full() -> Iterator[None]:
    """Compute float64 by torch's own loops and products, without cuDNN, whose results are in question."""
    enabled = torch.backends.cudnn.enabled
    # Not by its flags(), which refuses to read TF32's where the old and the new ones disagree.
    torch.backends.cudnn.enabled = False
    try:
        with force_mode(Mode.REFERENCE):
            yield
    finally:
        torch.backends.cudnn.enabled = enabled


def floating(value: Any) -> list[torch.Tensor]:
    """The floating-point tensors in ``value``, in order."""
    leaves = pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def map_floating(function: Any, value: Any) -> Any:
    """``value`` with every floating-point tensor in it replaced by ``function`` of it."""
    return pytree.tree_map(
        lambda leaf: function(leaf) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf, value
    )
