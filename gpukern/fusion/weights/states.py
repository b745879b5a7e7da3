"""The states in a checkpoint: dictionaries of tensors by name, wherever a training program put them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

#: Names that training programs give to the model's own state, the likeliest first.
_USUAL = ("model_state_dict", "state_dict", "model_state", "model", "net", "network", "module", "params", "student")
#: Names of averaged weights. Those are made for inference.
_AVERAGED = re.compile(r"(^|[^a-z])(ema|swa|avg|average|averaged|teacher|shadow)([^a-z]|$)")
#: How deep is looked, and into how many entries of a list.
_DEPTH, _ENTRIES = 6, 16


@dataclass(frozen=True)
class State:
    """The tensors of one dictionary, ``path`` being the keys that lead to it."""

    path: tuple[str, ...]
    tensors: Mapping[str, torch.Tensor]
    #: Versions of the modules' formats, as torch keeps them beside a state_dict.
    versions: Mapping[str, Any] | None = None


def states_in(held: Any) -> list[State]:
    """Every state in what a file holds, in order, without those of optimizers."""
    return list(_found(held, (), set()))


def _found(held: Any, path: tuple[str, ...], seen: set[int]) -> Iterator[State]:
    if len(path) > _DEPTH or id(held) in seen:
        return
    seen.add(id(held))
    if isinstance(held, (list, tuple)):
        held = {str(index): value for index, value in enumerate(held[:_ENTRIES])}
        tensors = {}  # of a list: they have no names
    elif isinstance(held, Mapping) and "param_groups" not in held:
        tensors = {n: t for n, t in held.items() if isinstance(n, str) and isinstance(t, torch.Tensor)}
    else:
        return
    if tensors:
        yield State(path, tensors, getattr(held, "_metadata", None))
    for name, value in held.items():
        if isinstance(name, str) and isinstance(value, (Mapping, list, tuple)):
            yield from _found(value, (*path, name), seen)


def unnamed_averages(held: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Labels of averaged weights that are lists: some averaging programs keep them by the order of the parameters."""
    if isinstance(held, (list, tuple)):
        if held and all(isinstance(value, torch.Tensor) for value in held):
            if is_averaged(".".join(path)):
                yield ".".join(path)
            return
        held = dict(enumerate(held[:_ENTRIES]))
    if isinstance(held, Mapping) and len(path) <= _DEPTH:
        for name, value in held.items():
            yield from unnamed_averages(value, (*path, str(name)))


def is_averaged(label: str) -> bool:
    """Whether a state or the prefix of its names is called after an average: "model_ema", "teacher."."""
    return _AVERAGED.search(label.lower()) is not None


def rank(label: str) -> int:
    """The place of a state's own name among the usual ones, the likeliest first."""
    parts = [part for part in label.split(".") if part]
    if not parts:
        return 0
    return 1 + max(_USUAL.index(part) if part in _USUAL else len(_USUAL) for part in parts)


def without(held: Any) -> str:
    """Describe the contents of a checkpoint without any state."""
    if isinstance(held, Mapping):
        if "param_groups" in held or any(isinstance(v, Mapping) and "param_groups" in v for v in held.values()):
            return "the state of an optimizer, and none of a model"
        names = [str(name) for name in held]
        return f"only {', '.join(names[:5])}{', …' if len(names) > 5 else ''}" if names else "nothing"
    return f"a {type(held).__name__}"
