"""``gpukern.convert``: swaps the ``torch.nn`` layers of a model for gpukern's subclasses of them.

A gpukern layer has the attributes of the torch layer and another ``forward``, so a layer is converted by changing the
class of the object. Its parameters, hooks, mode and name in the model stay what they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch.nn.utils import parametrize

import gpukern.nn
from gpukern.copies import CopyError, deep_copy, exchange_methods, modules_in
from gpukern.formatting import count
from gpukern.nn import foreign
from gpukern.nn.attention import MultiheadAttention
from gpukern.nn.leaf import derived, mark
from gpukern.nn.rebinding import Rebound
from gpukern.nn.sequential import is_plain, runs, subclass_of
from gpukern.runtime import kept
from gpukern.runtime.tensors import KERNEL_DTYPES

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["ConversionReport", "Layer", "LeftLayer", "Together", "convert"]

_OURS = tuple(getattr(gpukern.nn, name) for name in gpukern.nn.__all__ if name != "Sequential")

#: torch.nn layer → gpukern's, for every layer that gpukern.nn offers and torch.nn has
REPLACEMENTS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    getattr(torch.nn, ours.__name__): ours for ours in _OURS if hasattr(torch.nn, ours.__name__)
}

_STRUCTURE = (torch.nn.Identity, torch.nn.Flatten, torch.nn.Unflatten)
_CONTAINERS = (
    torch.nn.Sequential,
    gpukern.nn.Sequential,
    torch.nn.ModuleList,
    torch.nn.ModuleDict,
    torch.nn.ParameterList,
    torch.nn.ParameterDict,
)

#: What a subclass may define without computing another thing than its base.
_HARMLESS = {
    *("__init__", "__module__", "__qualname__", "__doc__", "__annotations__", "__repr__", "extra_repr"),
    *("reset_parameters", "__firstlineno__", "__static_attributes__", "__annotate__", "__parameters__"),
}
#: What a copy has in common with the original.
_SHARED = (torch.Tensor, *((torch.distributed.ProcessGroup,) if torch.distributed.is_available() else ()))

_FOOTNOTE = (
    "Calls inside forward (torch.nn.functional.relu, +, torch.cat, ...) are not layers: convert does not see them."
)


class Layer(NamedTuple):
    """A layer of the model: its dotted name (empty for the model itself) and the name of its ``torch.nn`` class."""

    name: str
    type: str


class LeftLayer(NamedTuple):
    """A layer that torch still computes, and why."""

    name: str
    type: str
    reason: str


class Partly(NamedTuple):
    """A layer of gpukern's in which torch still computes something, and what."""

    name: str
    type: str
    left: str


class Together(NamedTuple):
    """Neighbours in a ``torch.nn.Sequential`` that its call now computes as one: dotted names and class names."""

    names: tuple[str, ...]
    types: tuple[str, ...]

    @property
    def type(self) -> str:
        return " + ".join(self.types)


@dataclass(frozen=True)
class ConversionReport:
    """Report of :func:`convert`. A layer that the model has under several names is listed under the first."""

    replaced: tuple[Layer, ...]
    #: layers that were gpukern's before
    already: tuple[Layer, ...]
    left: tuple[LeftLayer, ...]
    together: tuple[Together, ...] = ()
    #: those of ``replaced`` and ``already`` that torch computes a part of
    partly: tuple[Partly, ...] = ()
    #: layers that compute no values of their own: they pad, permute, or drop or scale whole samples and channels
    moving: tuple[Layer, ...] = ()

    def __str__(self) -> str:
        lines = [self._headline("replaced", self.replaced)]
        if self.together:
            lines.append(self._headline("computed as one", self.together, "group"))
        if self.already:
            lines.append(self._headline("gpukern's already", self.already))
        lines += self._parts()
        if self.moving:
            lines.append(self._headline("nothing to compute", self.moving))
        lines.append(self._headline("left to torch", self.left))
        names = [layer.name or "(the model)" for layer in self.left]
        name_width = max(map(len, names), default=0)
        type_width = max((len(layer.type) for layer in self.left), default=0)
        for name, layer in zip(names, self.left, strict=True):
            lines.append(f"  {name:{name_width}}  {layer.type:{type_width}}  {layer.reason}")
        return "\n".join([*lines, _FOOTNOTE])

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        from gpukern.tables import table

        parts: list[RenderableType] = [Text(self._headline("replaced", self.replaced), style="green")]
        if self.together:
            parts.append(Text(self._headline("computed as one", self.together, "group"), style="green"))
        if self.already:
            parts.append(Text(self._headline("gpukern's already", self.already)))
        parts += [Text(line, style="yellow") for line in self._parts()]
        if self.moving:
            parts.append(Text(self._headline("nothing to compute", self.moving)))
        parts.append(Text(self._headline("left to torch", self.left), style="yellow" if self.left else "green"))
        if self.left:
            left = table("layer", "type", "why torch computes it")
            for name, kind, reason in self.left:
                left.add_row(Text(name or "(the model)"), kind, Text(reason))
            parts.append(left)
        return Group(*parts, Text(_FOOTNOTE, style="dim"))

    def _parts(self) -> list[str]:
        """A line for each thing that torch computes in layers that are replaced in part."""
        by_part: dict[str, list[Partly]] = {}
        for layer in self.partly:
            by_part.setdefault(layer.left, []).append(layer)
        return [f"{self._headline('replaced in part', of)}: torch computes {part}" for part, of in by_part.items()]

    @staticmethod
    def _headline(what: str, layers: Sequence[Layer | LeftLayer | Together | Partly], noun: str = "layer") -> str:
        kinds = Counter(layer.type for layer in layers)
        listed = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
        return f"{what}: {count(len(layers), noun)}{f' ({listed})' if listed else ''}"


@overload
def convert(
    model: torch.nn.Module, inplace: bool = False, *, return_report: Literal[False] = False
) -> torch.nn.Module: ...
@overload
def convert(
    model: torch.nn.Module, inplace: bool = False, *, return_report: Literal[True]
) -> tuple[torch.nn.Module, ConversionReport]: ...
def convert(
    model: torch.nn.Module, inplace: bool = False, *, return_report: bool = False
) -> torch.nn.Module | tuple[torch.nn.Module, ConversionReport]:
    """``model`` with every ``torch.nn`` layer that gpukern has computed by gpukern.

    Parameters
    ----------
    model:
        any module; layers are found at any depth, and the model may itself be one. A subclass of a ``torch.nn`` class
        is replaced if it redefines nothing that its base computes with, as are some layers of torchvision and timm,
        which are known by name (:mod:`gpukern.nn.foreign`): another may compute something else.
    inplace:
        change ``model`` and return it. Otherwise ``model`` stays as it is and the result is a copy whose tensors
        (parameters, buffers and their ``.grad``) are the very same objects, so that training the one trains the other
        and an optimizer made for the one serves both. All else is copied as :func:`copy.deepcopy` does.
    return_report:
        return ``(model, ConversionReport)``.

    A ``torch.nn.Sequential`` in which neighbouring layers can be computed together becomes a
    :class:`gpukern.nn.Sequential`, which documents its runs; one of a subclass that leaves ``forward`` alone gets a
    class derived from both. The report lists them under ``together``.

    Names, ``state_dict``, hooks, training mode, devices, ``requires_grad``, parametrizations and layers shared between
    several places are kept. Functions, bound methods and weak references that the model keeps, hooks among them, refer
    to the copy where they refer to the model. Layers that gpukern cannot serve stay torch's; the report lists them with
    the reason. Of attention the projections are gpukern's and the products torch's: the report has it under ``partly``.

    Raises
    ------
    TypeError if ``model`` is not a module; RuntimeError if it cannot be copied, or if a function would go on calling a
    module of the original: one that finds it in a list, an object or a global (``inplace=True`` needs no copy).
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"convert() takes a torch.nn.Module, got {type(model).__name__}")
    if not inplace:
        model = _copy_sharing_tensors(model)
    replaced: list[Layer] = []
    already: list[Layer] = []
    left: list[LeftLayer] = []
    partly: list[Partly] = []
    moving: list[Layer] = []
    classes: dict[torch.nn.Module, type[torch.nn.Module]] = {}
    for name, module in list(_layers(model, "", set())):
        kind = _torch_type(module)
        reason = _why_not(module, kind)
        if foreign.only_moves(kind):
            moving.append(Layer(name, kind.__name__))
        elif reason:
            left.append(LeftLayer(name, kind.__name__, reason))
        elif _is_ours(module):
            already.append(Layer(name, kind.__name__))
        else:
            _replace(module, kind)
            classes[module] = kind
            replaced.append(Layer(name, kind.__name__))
        if not reason and (part := foreign.left_part(kind)):
            partly.append(Partly(name, kind.__name__, part))
    exchange_methods(model, classes)
    together = [group for name, module in model.named_modules() for group in _compute_together(module, name)]
    report = ConversionReport(
        tuple(replaced), tuple(already), tuple(left), tuple(together), tuple(partly), tuple(moving)
    )
    return (model, report) if return_report else model


def _copy_sharing_tensors(model: torch.nn.Module) -> torch.nn.Module:
    """A deep copy of all but the tensors, and groups of processes, that modules hold."""
    memo: dict[int, object] = {}
    for module in modules_in(model):
        if isinstance(module, torch.jit.ScriptModule):
            continue  # its tensors live in C++, where no memo is consulted
        # Plain attributes too: torch.nn.utils.weight_norm keeps there what it computed, which no deepcopy takes.
        for values in (module._parameters, module._buffers, vars(module)):
            memo.update((id(value), value) for value in values.values() if isinstance(value, _SHARED))
    kept.fill(memo, model)
    try:
        return deep_copy(model, memo, share_tensors=True)
    except Exception as error:
        why = str(error) if isinstance(error, CopyError) else f"{type(error).__name__}: {error}"
        raise RuntimeError(
            f"convert() could not copy the model ({why}); gpukern.convert(model, inplace=True) needs no copy"
        ) from error


def _layers(module: torch.nn.Module, name: str, seen: set[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield (name, module) of every module that computes something itself, in the model's order, each once."""
    if module in seen:
        return
    seen.add(module)
    children = dict(module.named_children())
    if parametrize.is_parametrized(module):
        children.pop("parametrizations")
    composite = _is_composite(module)
    if (composite or not children or isinstance(module, tuple(REPLACEMENTS))) and not _is_structure(module):
        yield name, module
    if composite:
        return
    for child_name, child in children.items():
        yield from _layers(child, f"{name}.{child_name}" if name else child_name, seen)


def _is_composite(module: torch.nn.Module) -> bool:
    """Whether a module with children does not call them, but computes with their tensors itself."""
    if isinstance(module, (torch.jit.ScriptModule, torch.nn.MultiheadAttention)):
        return True
    return foreign.uses_weights_of_children(type(module)) or type(module).__module__.startswith("torch.ao.nn.")


def _is_structure(module: torch.nn.Module) -> bool:
    """Whether nothing is computed: containers, reshapes, and torch's own kinds of dropout outside of training."""
    kind = _torch_type(module)
    if isinstance(module, torch.nn.modules.dropout._DropoutNd) and kind not in (*REPLACEMENTS, *_OURS):
        return not module.training or module.p == 0
    return type(module) in (*_STRUCTURE, *_CONTAINERS)


def _torch_type(module: torch.nn.Module) -> type[torch.nn.Module]:
    return parametrize.type_before_parametrizations(module)


def _why_not(module: torch.nn.Module, kind: type[torch.nn.Module]) -> str | None:
    """Return the reason why torch still computes ``module``; None if gpukern can, or does already."""
    if _is_ours(module):
        return None
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript: convert the model before scripting it"
    if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
        return "not initialized yet: run the model once, then convert it"
    if _replacement(kind) is None:
        if kind.__module__.startswith("torch.ao.nn."):
            return "quantized or made ready for it: gpukern has no quantized layers"
        if (base := _base_of(kind)) is not None:
            return f"subclass of {base.__name__}: it redefines {', '.join(_redefined(base, kind))}"
        if isinstance(module, torch.fx.GraphModule):
            return "a traced graph without layers: convert does not look inside its forward"
        if kind.__module__.startswith("torch."):
            return f"gpukern has no {kind.__name__} yet"
        return "not a torch.nn layer: convert does not look inside its forward"
    if not {"forward", "_conv_forward"}.isdisjoint(vars(module)):
        return "forward was replaced on this object"
    if isinstance(module, torch.nn.LeakyReLU) and module.negative_slope < 0:
        return f"negative_slope = {module.negative_slope}: gpukern takes none below 0"
    if isinstance(module, torch.nn.ReLU6) and (module.min_val, module.max_val) != (0, 6):
        return f"it clamps to [{module.min_val}, {module.max_val}]: gpukern's ReLU6 to [0, 6] only"
    if kind not in REPLACEMENTS and (reason := foreign.why_not(module)):
        return reason
    for parameter in module.parameters():
        if type(parameter) not in (torch.nn.Parameter, torch.Tensor):
            return f"its parameters are of the tensor subclass {type(parameter).__name__}"
        if parameter.dtype not in KERNEL_DTYPES:
            return f"its parameters are {parameter.dtype}: the kernels take float32, float16 and bfloat16"
    return None


def _replacement(kind: type[torch.nn.Module]) -> type[torch.nn.Module] | None:
    """Return the class that a layer of exactly the class ``kind`` gets; None if gpukern has none."""
    known = REPLACEMENTS.get(kind) or foreign.replacement_of(kind)
    base = _base_of(kind)
    if known or base is None or _redefined(base, kind):
        return known
    return derived(REPLACEMENTS[base], kind)  # type: ignore[arg-type]  # classes are hashable


def _base_of(kind: type[torch.nn.Module]) -> type[torch.nn.Module] | None:
    """Return the class of ``torch.nn``, ``kind`` or above it, that gpukern has a layer for."""
    return next((each for each in kind.__mro__ if each in REPLACEMENTS), None)


def _redefined(base: type, kind: type) -> list[str]:
    """Names that a call of ``base`` may use, and that ``kind``, a subclass, defines in another way."""
    above = base.__mro__
    used = {name for each in above if each is not object for name in vars(each)} - _HARMLESS
    return sorted({name for each in kind.__mro__ if each not in above for name in used.intersection(vars(each))})


def _is_ours(module: torch.nn.Module) -> bool:
    return isinstance(module, (*_OURS, MultiheadAttention, Rebound))


def _replace(module: torch.nn.Module, kind: type[torch.nn.Module]) -> None:
    replacement: type = _replacement(kind)  # type: ignore[assignment]  # asked before
    if parametrize.is_parametrized(module):
        # torch gave the object a class of its own, with a property for each parametrized tensor. It gets another such
        # class, over gpukern's layer; removing the parametrization then leaves gpukern's layer.
        properties = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
        replacement = type(type(module).__name__, (replacement,), properties)
    module.__class__ = replacement
    mark(module)


def _compute_together(module: torch.nn.Module, name: str) -> list[Together]:
    """Give a Sequential whose layers are converted the forward of gpukern's; what that computes together."""
    if not isinstance(module, torch.nn.Sequential):
        return []
    names, children = [f"{name}.{key}" if name else key for key in module._modules], [*module._modules.values()]
    found = runs(tuple(type(child) for child in children))
    if not found:
        return []
    if not isinstance(module, gpukern.nn.Sequential):
        if not _has_torchs_forward(module):
            return []
        module.__class__ = subclass_of(type(module))  # type: ignore[assignment]
    layers = [slice(run.first, run.end) for run in found if all(map(is_plain, children[run.first : run.end]))]
    return [Together(tuple(names[of]), tuple(_torch_type(child).__name__ for child in children[of])) for of in layers]


def _has_torchs_forward(module: torch.nn.Sequential) -> bool:
    """Whether a call does what it does for every ``torch.nn.Sequential``."""
    called = ("forward", "__call__", "__iter__")
    return "forward" not in vars(module) and all(
        getattr(type(module), name) is getattr(torch.nn.Sequential, name) for name in called
    )
