"""Frozen values ↔ what JSON can hold: dataclasses, named tuples, tuples, dicts by text, numbers, text and None."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any

_NONE = type(None)


def plain(value: Any) -> Any:
    """``value`` of dicts, lists, numbers and text; infinities and NaN, which JSON lacks, as their names."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: plain(item) for name, item in value._asdict().items()}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def made(kind: Any, value: Any, where: str = "the report") -> Any:
    """What :func:`plain` took apart, of the annotated type ``kind``; ValueError, saying ``where``, for all else."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        (kind,) = (each for each in inner if each is not _NONE)
        return None if value is None else made(kind, value, where)
    if dataclasses.is_dataclass(kind) or hasattr(kind, "_fields"):
        return _composite(kind, value, where)
    if origin is tuple:
        return tuple(made(inner[0], item, f"{where}[{n}]") for n, item in enumerate(_of(list, value, where)))
    if origin is dict:
        return {key: made(inner[1], item, f"{where}.{key}") for key, item in _of(dict, value, where).items()}
    return _number_or_text(kind, value, where)


def _composite(kind: type, value: Any, where: str) -> Any:
    """Fields that are not there keep their default; those that a later version added are left out."""
    given = _of(dict, value, where)
    hints = typing.get_type_hints(kind)
    fields = {name: made(hint, given[name], f"{where}.{name}") for name, hint in hints.items() if name in given}
    try:
        return kind(**fields)
    except TypeError as problem:  # one without a default is missing
        raise ValueError(f"{where}: {problem}") from None


def _number_or_text(kind: type, value: Any, where: str) -> Any:
    if kind is float and value in ("nan", "inf", "-inf"):
        return float(value)
    if kind is float and type(value) is int:
        return float(value)
    return _of(kind, value, where)


def _of(kind: type, value: Any, where: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{where} is {type(value).__name__}, expected {kind.__name__}")
    return value
