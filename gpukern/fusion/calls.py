"""How the arguments of a fused model's call are those of the original's ``forward``: by place, by name, by default.

A captured graph knows the example's tensors as inputs; every number, flag and word of the example is a constant in it.
A call with another one is refused.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Sequence
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
    no text). ``by_name_only``: of those that may not. ``more``: whether it takes any number (``*args``).
    """

    names: tuple[str, ...] = ()
    defaults: dict[str, str | None] = field(default_factory=dict)
    by_name_only: tuple[str, ...] = ()
    more: bool = True

    @classmethod
    def of(cls, model: torch.nn.Module) -> Signature:
        try:
            found = inspect.signature(model.forward).parameters.values()
        except (TypeError, ValueError):  # of a function that Python cannot look into
            return cls()
        by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return cls(
            tuple(each.name for each in found if each.kind in by_place),
            {each.name: text(each.default) for each in found if each.default is not each.empty},
            tuple(each.name for each in found if each.kind is each.KEYWORD_ONLY),
            any(each.kind is each.VAR_POSITIONAL for each in found),
        )

    def name(self, place: int) -> str:
        """How an argument is called in a message."""
        return f"argument {self.names[place]!r}" if place < len(self.names) else f"argument {place}"

    def bound(self, inputs: tuple, named: dict[str, Any], example: Sequence[str | None]) -> tuple:
        """The arguments of a call by place, as many as the example had; ``example`` has the text of each of those.

        TypeError for an argument that is unknown, missing or given twice; ValueError for one that the example left at
        its default, and that is something else now.
        """
        if len(inputs) > len(self.names) and (not self.more or len(inputs) > len(example)):
            raise TypeError(
                f"expected arguments as in the example, {max(len(example), len(self.names))} at most, got {len(inputs)}"
            )
        given = dict(enumerate(inputs))
        for name, argument in named.items():
            if name in self.by_name_only:
                self._check_default(name, argument)
            elif name not in self.names:
                raise TypeError(f"unexpected argument {name!r}: the model takes {self._listed()}")
            elif (place := self.names.index(name)) in given:
                raise TypeError(f"argument {name!r} is given twice, by place and by name")
            else:
                given[place] = argument
        for place, argument in given.items():
            if place >= len(example):
                self._check_default(self.names[place], argument)
        return tuple(
            given[place] if place in given else self._left_out(place, example) for place in range(len(example))
        )

    def _left_out(self, place: int, example: Sequence[str | None]) -> Any:
        name = self.names[place] if place < len(self.names) else None
        if name not in self.defaults:
            raise TypeError(f"missing {self.name(place)}: expected arguments as in the example")
        default = self.defaults[name]
        if default is None or default != example[place]:
            raise ValueError(
                f"argument {name!r} was {example[place] or 'a tensor'} in the example, and is left at its default "
                f"{default or ''} now: fuse the model without it"
            )
        return AS_IN_THE_EXAMPLE

    def _check_default(self, name: str, argument: Any) -> None:
        default, now = self.defaults.get(name), text(argument)
        if default is None or now != default:
            raise ValueError(
                f"argument {name!r} was left at its default {default or ''} in the example, got {told(argument)}: "
                "fuse the model with it"
            )

    def _listed(self) -> str:
        return ", ".join((*self.names, *self.by_name_only)) or "arguments without names"


def told(value: Any) -> str:
    """``value`` in a message: short."""
    words = text(value)
    if words is None:
        return f"a {type(value).__name__}"
    return words if len(words) <= 60 else f"{words[:57]}..."
