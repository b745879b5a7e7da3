"""Copies of models that have everything the original has, and through which nothing of the original changes.

:func:`copy.deepcopy` forgets the mode and the hooks of ``torch.fx`` graph modules, does what a class's own
``__deepcopy__`` does, and takes functions and weak references as they are: what they refer to is still the original.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpukern.runtime.kept import reach

__all__ = ["CopyError", "deep_copy", "exchange_methods", "modules_in"]

_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
#: Types that refer to no module, or to none that a copy could share with its original.
_ATOMS = (
    *(type(None), bool, int, float, complex, str, bytes, type, types.ModuleType, types.BuiltinFunctionType),
    *(torch.dtype, torch.device, torch.Size, torch.fx.Graph, torch.fx.Node, torch.Generator),
)
_LISTS = (list, deque)
_SETS = (set, frozenset)
_WEAK = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet)


class CopyError(RuntimeError):
    """A copy would share something with the original."""


def deep_copy(model: torch.nn.Module, memo: dict[int, Any], *, share_tensors: bool) -> torch.nn.Module:
    """:func:`copy.deepcopy` of ``model`` with ``memo``, module by module in the original's mode and with its hooks.

    Functions, :func:`functools.partial` objects, bound methods and weak references that refer to the model's modules
    refer to the copy's. With ``share_tensors`` the parameters and buffers of the copy are the original's, without it
    none is. No random number is drawn.

    Raises
    ------
    CopyError where a module of the original would be reached through the copy, or the copy is another model; whatever
    :func:`copy.deepcopy` raises.
    """
    with _random_state_kept():
        for module in modules_in(model):
            _copy_graph_module(module, memo)
        copied = copy.deepcopy(model, memo)
    _restore(model, copied, share_tensors)
    names = {id(module): name for name, module in model.named_modules()}
    _Exchange(memo, names, {id(each): each for each in _reached(model)}).of(copied, "")
    return copied


def exchange_methods(model: torch.nn.Module, classes: dict[torch.nn.Module, type[torch.nn.Module]]) -> None:
    """Rebind bound methods that ``model`` keeps of modules whose class was changed from the one in ``classes``: they
    become the new class's methods."""
    twins, methods = {}, [each for each in _reached(model) if isinstance(each, types.MethodType)]
    for method in methods:
        of, name = method.__self__, method.__name__
        if isinstance(of, torch.nn.Module) and getattr(classes.get(of), name, None) is method.__func__:
            twins[id(method)] = getattr(of, name)
    if twins:
        _Exchange(twins, {}, {}).of(model, "")


def modules_in(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules of ``model``, and those that it has in lists and other attributes that torch does not look into."""
    return [each for each in _reached(model) if isinstance(each, torch.nn.Module)]


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """A class's own ``__deepcopy__`` may make layers, which draw their weights."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        yield


def _copy_graph_module(module: torch.nn.Module, memo: dict[int, Any]) -> None:
    """Put a whole copy into ``memo`` if ``module`` is a ``torch.fx.GraphModule``, whose own ``__deepcopy__`` keeps
    what the graph calls and nothing else."""
    if not isinstance(module, torch.fx.GraphModule) or id(module) in memo:
        return
    for child in list(module.modules())[1:]:
        _copy_graph_module(child, memo)
    # Its class, which has the generated forward, belongs to the one object; __new__ makes another.
    copied = type(module).__new__(type(module))
    type(copied).__name__ = type(module).__name__
    memo[id(module)] = copied
    copied.__dict__ = copy.deepcopy(module.__dict__, memo)
    copied.graph = copied.__dict__.pop("_graph")
    for hook in getattr(copied, "_deepcopy_hooks", ()):
        hook(copied)


def _restore(model: torch.nn.Module, copied: torch.nn.Module, share_tensors: bool) -> None:
    """Give ``copied`` what a ``__deepcopy__`` left out. CopyError if it is another model."""
    found = dict(copied.named_modules(remove_duplicate=False))
    for name, module in model.named_modules(remove_duplicate=False):
        twin, where = found.pop(name, None), f"of {name!r}" if name else "of the model"
        if twin is None:
            raise CopyError(f"copy.deepcopy gives a model without {name!r}")
        if twin is module:
            raise CopyError(f"copy.deepcopy {where} gives the very same module")
        if twin.training != module.training:
            twin.training = module.training
        _restore_tensors(module, twin, where, share_tensors)
        for hooks in _HOOKS:
            if len(getattr(twin, hooks, ())) != len(getattr(module, hooks, ())):
                raise CopyError(f"copy.deepcopy {where} does not keep its {hooks.strip('_').replace('_', ' ')}")
    if found:
        raise CopyError(f"copy.deepcopy gives a model with {next(iter(found))!r}, which the original has not")


def _restore_tensors(module: torch.nn.Module, twin: torch.nn.Module, where: str, share: bool) -> None:
    for kind in ("_parameters", "_buffers"):
        theirs, ours = getattr(module, kind), getattr(twin, kind)
        if theirs.keys() != ours.keys():
            raise CopyError(f"copy.deepcopy {where} has other {kind.strip('_')}: {list(ours)} for {list(theirs)}")
        for name, tensor in theirs.items():
            if share:
                ours[name] = tensor
            elif tensor is not None and ours[name] is tensor:
                raise CopyError(f"copy.deepcopy {where} has the very same {name!r}")


# ---- what a model refers to ------------------------------------------------------------------------------------------


def _reached(value: Any) -> Iterator[Any]:
    """Yield everything reachable from ``value`` that a copy might share with its original, each once."""
    return reach(value, _parts, _is_atom)


def _is_atom(value: Any) -> bool:
    return isinstance(value, _ATOMS) and not isinstance(value, types.BuiltinFunctionType)


def _parts(value: Any) -> list[Any]:
    """Yield the objects to which ``value`` refers directly."""
    if isinstance(value, torch.Tensor):
        return []
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, (*_LISTS, tuple, *_SETS)):
        return list(value)
    if isinstance(value, types.FunctionType):
        cells = map(_contents, value.__closure__ or ())
        return [*cells, value.__defaults__, value.__kwdefaults__, vars(value), *(held for _, held in _globals(value))]
    if isinstance(value, (types.MethodType, types.BuiltinFunctionType)):
        return [value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords, vars(value)]
    if isinstance(value, weakref.ref):
        return [value()]
    if isinstance(value, _WEAK):
        return list(value.items() if hasattr(value, "items") else value)
    return [held for _, held, _ in _attributes(value)]


def _attributes(value: Any) -> Iterator[tuple[str, Any, Callable[[Any], None]]]:
    """(name, what it has, what sets it) of an object's attributes; those of TorchScript are none of Python's."""
    if isinstance(value, torch.jit.ScriptModule):
        return
    own = getattr(value, "__dict__", {})
    for name, held in list(own.items()):
        yield name, held, functools.partial(own.__setitem__, name)
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                # Also sets fields of frozen dataclasses.
                yield name, getattr(value, name), functools.partial(object.__setattr__, value, name)


def _globals(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """(name, value) of what the code may find layers through: modules, functions of the same file, containers."""
    kinds = (torch.nn.Module, types.MethodType, functools.partial, weakref.ref, dict, *_LISTS, tuple, *_SETS)
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        near = isinstance(value, types.FunctionType) and value.__globals__ is function.__globals__
        if near or isinstance(value, kinds):
            yield name, value


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _item(path: str, key: Any) -> str:
    if path.split(".")[-1] in ("_modules", "_parameters", "_buffers"):
        return f"{path.removesuffix(path.split('.')[-1])}{key}"
    return f"{path}[{key!r}]" if isinstance(key, (str, int)) else path


def _exchange(old: Any, new: Any, put: Callable[[Any], None]) -> None:
    if new is not old:
        put(new)


class _Exchange:
    """Puts other objects in the places of some, in all that an object reaches: ``twins`` has them by id.

    ``names``: modules that must not be reached any more, by id; ``common``: what is not to be changed, because other
    objects share it. Both must be alive.
    """

    def __init__(self, twins: dict[int, Any], names: dict[int, str], common: dict[int, Any]) -> None:
        self._twins, self._names, self._common = twins, names, common
        self._done: dict[int, Any] = {}
        self._cells: dict[int, types.CellType] = {}
        self._kept: list[Any] = []

    def of(self, value: Any, path: str) -> Any:
        """Return the replacement of ``value``; containers and objects are changed in place."""
        twin = self._twins.get(id(value), value)
        if twin is not value:
            return twin
        if id(value) in self._names:
            raise self._error(value, path)
        if isinstance(value, (torch.Tensor, *_ATOMS)):
            return self._method_of_c(value, path) if isinstance(value, types.BuiltinFunctionType) else value
        if id(value) not in self._done:
            self._kept.append(value)
            self._done[id(value)] = value
            self._done[id(value)] = self._made(value, path)
        return self._done[id(value)]

    def _made(self, value: Any, path: str) -> Any:
        if isinstance(value, types.FunctionType):
            return self._function(value, path)
        if isinstance(value, types.MethodType):
            of = self.of(value.__self__, path)
            return value if of is value.__self__ else types.MethodType(value.__func__, of)
        if isinstance(value, weakref.WeakMethod):
            return self._checked(value, path)
        if isinstance(value, weakref.ref):
            target = value()
            twin = self._twins.get(id(target), target)
            return self._checked(value, path) if twin is target else type(value)(twin)
        if isinstance(value, tuple):
            parts = [self.of(each, path) for each in value]
            if all(map(operator.is_, parts, value)):
                return value
            return value._make(parts) if hasattr(value, "_make") else type(value)(parts)
        if type(value) is functools.partial:
            return self._partial(value, path)
        if id(value) in self._common or isinstance(value, (*_SETS, *_WEAK)):
            # The original has the very same, or its parts cannot be exchanged.
            return self._checked(value, path)
        if isinstance(value, dict):
            for key, held in list(value.items()):
                if self.of(key, path) is not key:
                    self._checked(key, path)
                _exchange(held, self.of(held, _item(path, key)), functools.partial(dict.__setitem__, value, key))
        elif isinstance(value, _LISTS):
            for number, held in enumerate(value):
                _exchange(held, self.of(held, _item(path, number)), functools.partial(value.__setitem__, number))
        else:
            for name, held, put in _attributes(value):
                _exchange(held, self.of(held, f"{path}.{name}" if path else name), put)
        return value

    def _partial(self, value: functools.partial, path: str) -> functools.partial:
        if not self._refers(value):
            return value
        keywords = {name: self.of(held, path) for name, held in value.keywords.items()}
        made = functools.partial(self.of(value.func, path), *self.of(value.args, path), **keywords)
        vars(made).update({name: self.of(held, path) for name, held in vars(value).items()})
        return made

    def _function(self, function: types.FunctionType, path: str) -> types.FunctionType:
        """Rebuild a function that refers to exchanged objects; all else it refers to is shared."""
        for name, value in _globals(function):
            self._checked(value, f"the global {name!r} in {path}")
        if not self._refers(function):
            return function
        cells = tuple(map(self._cell, function.__closure__ or ()))
        made = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
        self._done[id(function)] = made
        for name, old, new in zip(function.__code__.co_freevars, function.__closure__ or (), cells, strict=True):
            if new is not old:
                new.cell_contents = self.of(old.cell_contents, f"{name!r} in {path}")
        made.__defaults__ = self.of(function.__defaults__, path)
        given = function.__kwdefaults__
        made.__kwdefaults__ = given and {name: self.of(value, path) for name, value in given.items()}
        vars(made).update({name: self.of(value, path) for name, value in vars(function).items()})
        for name in ("__qualname__", "__module__", "__doc__", "__annotations__"):
            setattr(made, name, getattr(function, name))
        return made

    def _cell(self, cell: types.CellType) -> types.CellType:
        """Another variable, which several functions may have in common, for one that keeps what is exchanged."""
        if id(cell) not in self._cells:
            self._kept.append(cell)
            self._cells[id(cell)] = types.CellType() if self._refers(_contents(cell)) else cell
        return self._cells[id(cell)]

    def _method_of_c(self, value: Any, path: str) -> Any:
        """Rebind a method of a C object, such as ``some_list.append``."""
        of = value.__self__
        if of is None or isinstance(of, types.ModuleType) or self._twins.get(id(of), of) is of:
            return value
        return getattr(self._twins[id(of)], value.__name__)

    def _refers(self, value: Any) -> bool:
        """Whether anything is reached that is exchanged."""
        found = _reached(value)
        return any(id(each) in self._names or self._twins.get(id(each), each) is not each for each in found)

    def _checked(self, value: Any, path: str) -> Any:
        """``value`` as it is. CopyError if a module that must not be reached is reached through it."""
        for each in _reached(value):
            if id(each) in self._names:
                raise self._error(each, path)
        return value

    def _error(self, module: torch.nn.Module, path: str) -> CopyError:
        name = self._names[id(module)]
        return CopyError(f"the copy would still have the original's {name or 'model'!r}: {path}")
