"""Layers whose forward calls functions of ``torch.nn.functional``, with those that gpukern has in their place.

The forward itself, its checks and its errors stay what they are: what the names in it refer to is exchanged.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch

from gpukern import functional


class Rebound(torch.nn.Module):
    """What a class is derived from, before another library's, to have the forward of that with gpukern's functions."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if len(cls.__bases__) > 1:
            cls.forward = with_ours(cls.__bases__[-1].forward)  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=256)
def with_ours(function: types.FunctionType) -> types.FunctionType:
    """``function``, and the functions of its file that it calls, with gpukern's for those of torch.nn.functional."""
    return _in(function, _space(function))


def _space(function: types.FunctionType) -> dict[str, Any]:
    """The globals of the file of ``function``, exchanged."""
    theirs, ours = vars(torch.nn.functional), _ours()
    space = dict(function.__globals__)
    # Dynamo would look names up in the module that is called so.
    space.pop("__name__", None)
    for name, value in function.__globals__.items():
        if value is torch.nn.functional:
            space[name] = _module()
        elif isinstance(value, types.FunctionType) and value.__globals__ is function.__globals__:
            space[name] = _in(value, space)
        known = getattr(value, "__name__", None) if callable(value) else None
        if known in ours and theirs.get(known) is value:
            space[name] = ours[known]
    return space


def _in(function: types.FunctionType, space: dict[str, Any]) -> types.FunctionType:
    made = types.FunctionType(function.__code__, space, function.__name__, function.__defaults__, function.__closure__)
    for name in ("__kwdefaults__", "__qualname__", "__module__", "__doc__", "__annotations__"):
        setattr(made, name, getattr(function, name))
    return made


@functools.cache
def _ours() -> dict[str, Any]:
    return {name: getattr(functional, name) for name in functional.__all__ if hasattr(torch.nn.functional, name)}


@functools.cache
def _module() -> types.ModuleType:
    made = types.ModuleType("torch.nn.functional")
    vars(made).update({**vars(torch.nn.functional), **_ours()})
    return made
