"""Objects that a model holds besides its weights, and their copies in a copy of the model.

A model that has run may keep activations, which are part of a graph of autograd: :func:`copy.deepcopy` refuses those.
Locks, files and Python modules have no copies at all.
"""

from __future__ import annotations

import gc
import io
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

#: Types that a copy shares with the original: they take no part in the computation.
_COMMON = (
    *(types.ModuleType, io.IOBase, threading.Thread, threading.local),
    *(type(threading.Lock()), type(threading.RLock()), torch.cuda.Stream, torch.cuda.Event),
)
#: Types that :func:`copy.deepcopy` does not look into.
_ATOMS = (
    *(type(None), bool, int, float, complex, str, bytes, type, types.FunctionType, types.BuiltinFunctionType),
    *(types.CodeType, types.FrameType, types.GeneratorType, torch.dtype, torch.device, torch.fx.Node),
)


def fill(memo: dict[int, Any], model: torch.nn.Module) -> None:
    """Enter into ``memo``, for :func:`copy.deepcopy` of ``model``, all objects that it could not copy, wherever held.

    The copy gets only the values of a tensor that autograd computed; it shares Python modules, locks, threads, streams
    and open files with the original.
    """
    for held in _reached(model):
        if id(held) in memo:
            continue
        if isinstance(held, _COMMON):
            memo[id(held)] = held
        elif isinstance(held, torch.Tensor) and held.grad_fn is not None:
            memo[id(held)] = held.detach().clone()


def _reached(model: torch.nn.Module) -> Iterator[Any]:
    """Everything in the attributes of the model's modules: containers, objects of any class, objects bound to hooks."""
    return reach(model, _held_by, lambda value: isinstance(value, _ATOMS))


def _held_by(value: Any) -> Iterable[Any]:
    if isinstance(value, torch.Tensor):
        return vars(value).values()
    return () if isinstance(value, _COMMON) else gc.get_referents(value)


def reach(start: Any, held_by: Callable[[Any], Iterable[Any]], is_atom: Callable[[Any], bool]) -> Iterator[Any]:
    """Yield ``start`` and all objects it holds, directly by ``held_by`` or through others: each once, and no atoms."""
    seen: dict[int, Any] = {}  # and alive, so that no other object gets its id
    waiting = [start]
    while waiting:
        each = waiting.pop()
        if id(each) not in seen and not is_atom(each):
            seen[id(each)] = each
            yield each
            waiting += held_by(each)
