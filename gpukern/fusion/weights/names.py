"""Mapping of a file's names to the model's own: wrappers and prefixes removed, names of older versions renamed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from gpukern.fusion.weights.states import State

#: Modules that hold the model as their child of this name: DataParallel and AveragedModel, torch.compile, FSDP,
#: activation checkpoints, Fabric.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
#: What averaging models keep beside the weights.
_COUNTERS = {"n_averaged", "steps", "num_updates", "decay"}
#: Prefixes that are tried.
_PREFIXES = 8
#: Names that published files still have: torchvision's DenseNet ("." in a name was allowed once), and the first norms.
_RENAMED = (
    (re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])(?=\.)"), r"\1\2"),
    (re.compile(r"\bgamma$"), "weight"),
    (re.compile(r"\bbeta$"), "bias"),
)
#: Outputs that are computed in training only, or beside the result: torchvision's Inception, GoogLeNet, segmentation.
_AUXILIARY = re.compile(r"(aux_classifier|aux1|aux2|AuxLogits)\.")


@dataclass(frozen=True)
class Fit:
    """The tensors of ``state`` under the ``prefix``, by the model's names as far as it has them."""

    state: State
    prefix: str
    #: The model's own name of a tensor, or the file's where the model has none.
    tensors: Mapping[str, torch.Tensor]
    #: The file's names that are not under the prefix.
    others: tuple[str, ...]
    #: The model's names that have no tensor, but for those it can do without.
    missing: tuple[str, ...]

    @property
    def label(self) -> str:
        """Location in the file: "state_dict", "teacher.backbone."."""
        return ".".join((*self.state.path, self.prefix)).lstrip(".") if self.prefix else ".".join(self.state.path)


def fits(state: State, own: Mapping[str, torch.Tensor]) -> list[Fit]:
    """Match the names of ``state`` with those of a model whose ``state_dict`` is ``own``: the best per prefix."""
    theirs, ours = _bare(state.tensors), _bare(own)
    back = {bare: name for name, bare in ours.items()}
    found = Counter(
        bare[: len(bare) - len(name)]
        for bare in theirs.values()
        for name in _endings(bare)
        if name in back or any(new in back for new in _older(name))
    )
    # Under the prefix of the whole model there are most.
    prefixes = ["", *(prefix for prefix, _ in found.most_common(_PREFIXES))]
    outer = _common(back)  # the model is in a module of its own, and the file's is not
    candidates = [_fit(state, theirs, own, back, prefix) for prefix in prefixes]
    if outer and all(candidate.missing for candidate in candidates):
        inner = {name.removeprefix(outer): whole for name, whole in back.items()}
        candidates.append(_fit(state, theirs, own, inner, ""))
    return candidates


def _fit(
    state: State, theirs: Mapping[str, str], own: Mapping[str, torch.Tensor], back: Mapping[str, str], prefix: str
) -> Fit:
    tensors, others = {}, []
    for name, bare in theirs.items():
        if not bare.startswith(prefix):
            if bare not in _COUNTERS:
                others.append(name)
            continue
        short = bare.removeprefix(prefix)
        known = next((new for new in (short, *_older(short)) if new in back), None)
        if known is not None:
            tensors[back[known]] = state.tensors[name]
        elif bare not in _COUNTERS:
            tensors[short] = state.tensors[name]
    return Fit(state, prefix, tensors, tuple(others), tuple(missing(own, tensors)))


def completed(fit: Fit, own: Mapping[str, torch.Tensor]) -> Fit:
    """Add missing tensors from another prefix, if just one has them: MMLab's ``backbone.`` and ``head.``."""
    tensors, others = dict(fit.tensors), list(fit.others)
    for name in fit.missing:
        there = [other for other in others if unwrapped(other).endswith(f".{unwrapped(name)}")]
        if len(there) == 1:
            tensors[name] = fit.state.tensors[there[0]]
            others.remove(there[0])
    lacking = tuple(missing(own, tensors))
    return fit if lacking or not fit.prefix else replace(fit, tensors=tensors, others=tuple(others), missing=())


def plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove wrappers from the names, and the entries that averaging models keep besides the weights."""
    bare = _bare(tensors)
    return {bare[name]: held for name, held in tensors.items() if bare[name] not in _COUNTERS}


def missing(own: Mapping[str, torch.Tensor], given: Collection[str]) -> list[str]:
    """The names without which a model does not compute what was trained.

    Not the counters of batch norm and of averaging, which evaluation does not read, nor auxiliary outputs, nor a tied
    tensor's other name.
    """
    held = {_place(own[name]) for name in given if name in own} - {None}
    return [
        name
        for name in own
        if name not in given
        and not name.endswith(("num_batches_tracked", "n_averaged"))
        and not is_auxiliary(name)
        and _place(own[name]) not in held
    ]


def is_auxiliary(name: str) -> bool:
    """Whether the tensor is of an output that is not the result."""
    return _AUXILIARY.match(name) is not None


def _place(tensor: object) -> tuple | None:
    """Equal for tensors that are the same memory."""
    if not isinstance(tensor, torch.Tensor) or torch.nn.parameter.is_lazy(tensor) or not tensor.numel():
        return None
    return None if tensor.is_meta else (tensor.data_ptr(), tensor.shape, tensor.stride())


def _older(name: str) -> list[str]:
    return [new for pattern, by in _RENAMED if (new := pattern.sub(by, name)) != name]


def _bare(names: Iterable[str]) -> dict[str, str]:
    """Each name without the wrappers in it; as it is where that would make two of them one."""
    bare = {name: unwrapped(name) for name in names}
    return bare if len(set(bare.values())) == len(bare) else {name: name for name in bare}


def unwrapped(name: str) -> str:
    """A module's name without wrappers."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _endings(name: str) -> list[str]:
    """The name without its first parts, for each number of them but 0."""
    return [name[match.end() :] for match in re.finditer(r"\.", name)]


def _common(names: Collection[str]) -> str:
    """Return the first part, with its dot, that all names share; "" if there is none."""
    first, _, _ = next(iter(names), "").partition(".")
    prefix = first + "."
    return prefix if len(names) > 0 and all(name.startswith(prefix) for name in names) else ""
