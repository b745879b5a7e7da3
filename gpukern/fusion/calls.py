"""Binding of a fused model's arguments to the original's ``forward``: by position, by name, by default.

Inside, arguments are in the example's order: positional ones, then those that the example could give by name only.

A captured graph has the example's tensors as inputs; every number, flag and word of the example is a constant in it.
A call with another one is refused.
"""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


class _AsInTheExample:
    def __repr__(self) -> str:
        return "as in the example"


#: In the place of an argument that was not given, and whose default is the example's.
AS_IN_THE_EXAMPLE = _AsInTheExample()


def text(value: Any) -> str | None:
    """A number, flag, word or None, or a list, tuple or dict of such, as text that only equals that of the same; None
    for anything else."""
    if type(value) in (list, tuple):
        return None if None in map(text, value) else repr(value)
    if type(value) is dict:
        return None if None in map(text, (*value.keys(), *value.values())) else repr(value)
    return repr(value) if type(value) in _PLAIN or isinstance(value, enum.Enum) else None


@dataclass(frozen=True)
class Signature:
    """The parameters of the original's ``forward``.

    ``names``: of those that may be given by place. ``defaults``: the text of each default, by name (None where it has
    no text). ``by_name_only``: of those that may not. ``more``: whether it takes any number (``*args``). ``by_name``:
    those that the example gave by name, and that had no place after the others: they are its last arguments.
    """

    names: tuple[str, ...] = ()
    defaults: dict[str, str | None] = field(default_factory=dict)
    by_name_only: tuple[str, ...] = ()
    more: bool = True
    by_name: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: torch.nn.Module, by_name: Sequence[str] = ()) -> Signature:
        parameters = _parameters(model)
        if parameters is None:
            return cls(by_name=tuple(by_name))
        found = parameters.parameters.values()
        by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return cls(
            tuple(each.name for each in found if each.kind in by_place),
            {each.name: text(each.default) for each in found if each.default is not each.empty},
            tuple(each.name for each in found if each.kind is each.KEYWORD_ONLY),
            any(each.kind is each.VAR_POSITIONAL for each in found),
            tuple(by_name),
        )

    def arguments(self, count: int) -> list[str | int]:
        """Names of the ``count`` arguments of the example; the place of one that has none."""
        return [*map(self._name_at, range(count - len(self.by_name))), *self.by_name]

    def _name_at(self, place: int) -> str | int:
        return self.names[place] if place < len(self.names) else place

    def split(self, inputs: tuple) -> tuple[tuple, dict[str, Any]]:
        """The example's arguments as a call has them: by place, and by name."""
        places = len(inputs) - len(self.by_name)
        return inputs[:places], dict(zip(self.by_name, inputs[places:], strict=True))

    def bound(self, inputs: tuple, named: dict[str, Any], example: Sequence[str | None]) -> tuple:
        """The arguments of a call in the order of the example's; ``example`` has the text of each of those.

        TypeError for an argument that is unknown, missing or given twice; ValueError for one that the example left at
        its default, and that is something else now.
        """
        places = len(example) - len(self.by_name)
        if len(inputs) > len(self.names) and (not self.more or len(inputs) > places):
            most = max(places, len(self.names))
            raise TypeError(f"expected arguments as in the example, {most} at most by place, got {len(inputs)}")
        given = {self._name_at(place): argument for place, argument in enumerate(inputs)}
        for name, argument in named.items():
            if name not in (*self.names, *self.by_name_only, *self.by_name):
                raise TypeError(f"unexpected argument {name!r}: the model takes {self._listed()}")
            if name in given:
                raise TypeError(f"argument {name!r} is given twice, by place and by name")
            given[name] = argument
        wanted = dict(zip(self.arguments(len(example)), example, strict=True))
        for key, argument in given.items():
            if key not in wanted:
                self._check_default(key, argument)
        return tuple(given[name] if name in given else self._left_out(name, text) for name, text in wanted.items())

    def _left_out(self, name: str | int, example: str | None) -> Any:
        if name not in self.defaults:
            raise TypeError(f"missing argument {name!r}: expected arguments as in the example")
        default = self.defaults[name]
        if default is None or default != example:
            raise ValueError(
                f"argument {name!r} was {example or 'a tensor'} in the example, and is left at its default "
                f"{default or ''} now: fuse the model without it"
            )
        return AS_IN_THE_EXAMPLE

    def _check_default(self, name: Any, argument: Any) -> None:
        default, now = self.defaults.get(name), text(argument)
        if default is None or now != default:
            raise ValueError(
                f"argument {name!r} was left at its default {default or ''} in the example, got {told(argument)}: "
                "fuse the model with it"
            )

    def _listed(self) -> str:
        known = dict.fromkeys((*self.names, *self.by_name_only, *self.by_name))
        return ", ".join(known) or "arguments without names"


def _parameters(model: torch.nn.Module) -> inspect.Signature | None:
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):  # of a function that Python cannot look into
        return None


def in_order(model: torch.nn.Module, inputs: tuple, named: dict[str, Any]) -> tuple[tuple, tuple[str, ...]]:
    """Return a call's arguments of ``model`` with those given by name in their positions or, if they have none
    after the others, at the end; and the names of these. TypeError, as of Python, where they are not the model's."""
    parameters = _parameters(model) if named else None
    if parameters is not None:
        bound = parameters.bind(*inputs, **named)
        inputs, named = bound.args, bound.kwargs
    return (*inputs, *named.values()), tuple(named)


def take_in_order(model: torch.nn.Module, names: tuple[str, ...]) -> None:
    """Let ``model`` take its last arguments by place that its ``forward`` has by the ``names``."""
    if names:
        model.forward = functools.partial(_call_by_name, model.forward, names)


def _call_by_name(forward: Callable[..., Any], names: tuple[str, ...], *arguments: Any) -> Any:
    by_place = len(arguments) - len(names)
    return forward(*arguments[:by_place], **dict(zip(names, arguments[by_place:], strict=True)))


def told(value: Any) -> str:
    """Format ``value`` for a message: short."""
    words = text(value)
    if words is None:
        return f"a {type(value).__name__}"
    return words if len(words) <= 60 else f"{words[:57]}..."
