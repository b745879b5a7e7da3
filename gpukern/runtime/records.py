"""Conversion between dataclasses and JSON values, by their annotations.

Dataclasses and named tuples are objects, enumerations their values, tuples lists. No library, because the files were
there first: msgspec and cattrs write a named tuple as a list, and msgspec a NaN as null.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

_NONE = type(None)
#: Numbers that JSON does not have.
_NONFINITE = ("nan", "inf", "-inf")
_hints = functools.cache(typing.get_type_hints)


class RecordError(ValueError):
    """A value does not fit its annotation; the message gives its location and what was expected."""


def plain(value: Any, *, name_nonfinite: bool = False) -> Any:
    """Convert ``value`` to dicts, lists, numbers, text and None; all else is left as it is, for ``json`` to refuse.

    ``name_nonfinite``: whether NaN and infinities become the text "nan", "inf" or "-inf", as :func:`build` reads them.
    """
    inner = functools.partial(plain, name_nonfinite=name_nonfinite)
    if dataclasses.is_dataclass(value):
        return {field.name: inner(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: inner(item) for name, item in value._asdict().items()}
    if isinstance(value, Mapping):
        return {name: inner(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [inner(item) for item in value]
    if name_nonfinite and isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def build(kind: Any, value: Any, where: str, *, ignore_unknown: bool = False) -> Any:
    """Build an object of the annotated type ``kind`` from :func:`plain`'s output; ``where`` is its name in messages.

    Fields that are missing keep their default. Those that ``kind`` does not have are refused unless ``ignore_unknown``.
    A number without a fraction is a float too. RecordError for all that does not fit.
    """
    inner = functools.partial(build, ignore_unknown=ignore_unknown)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        (kind,) = (each for each in arguments if each is not _NONE)
        return None if value is None else inner(kind, value, where)
    if origin is Literal:
        return _require(value in arguments, where, f"one of {', '.join(map(repr, arguments))}", value)
    if origin in (tuple, list):
        return origin(_items(origin, arguments, _require(type(value) is list, where, "a list", value), where, inner))
    if origin in (dict, Mapping):
        _require(type(value) is dict, where, "an object", value)
        return {name: inner(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    if dataclasses.is_dataclass(kind) or hasattr(kind, "_fields"):
        return _composite(kind, _require(type(value) is dict, where, "an object", value), where, inner, ignore_unknown)
    return _enumerated(kind, value, where) if issubclass(kind, enum.Enum) else _number_or_text(kind, value, where)


def _items(origin: type, kinds: tuple, values: list, where: str, inner: Callable) -> Iterator[Any]:
    if origin is list or kinds[1:] == (...,):
        kinds = kinds[:1] * len(values)
    _require(len(values) == len(kinds), where, f"{len(kinds)} items", values)
    for number, (kind, item) in enumerate(zip(kinds, values, strict=True)):
        yield inner(kind, item, f"{where}[{number}]")


def _composite(kind: type, given: dict, where: str, inner: Callable, ignore_unknown: bool) -> Any:
    needed = dict(_fields(kind))
    unknown = sorted(given.keys() - needed)
    if unknown and not ignore_unknown:
        raise RecordError(f"{where}: unknown {', '.join(unknown)}")
    missing = [name for name, has_default in needed.items() if not has_default and name not in given]
    if missing:
        raise RecordError(f"{where}: no {', '.join(missing)}")
    hints = _hints(kind)
    return kind(**{name: inner(hints[name], given[name], f"{where}.{name}") for name in needed if name in given})


def _fields(kind: Any) -> Iterator[tuple[str, bool]]:
    """The name of each field, and whether it has a default."""
    if not dataclasses.is_dataclass(kind):
        yield from ((name, name in kind._field_defaults) for name in kind._fields)
        return
    for field in dataclasses.fields(kind):
        yield field.name, not field.default is field.default_factory is dataclasses.MISSING


def _enumerated(kind: type[enum.Enum], value: Any, where: str) -> enum.Enum:
    members = {member.value: member for member in kind}
    _require(value in list(members), where, f"one of {', '.join(map(repr, members))}", value)
    return members[value]


def _number_or_text(kind: type, value: Any, where: str) -> Any:
    if kind is float and value in _NONFINITE:
        return float(value)
    accepted = (int, float) if kind is float else (kind,)
    return _require(type(value) in accepted, where, kind.__name__, value)


def _require(holds: bool, where: str, expected: str, value: Any) -> Any:
    if not holds:
        raise RecordError(f"{where}: expected {expected}, got {json.dumps(value)[:60]}")
    return value
