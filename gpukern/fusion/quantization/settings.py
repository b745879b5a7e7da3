"""What was asked of a quantization, checked before anything is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gpukern.fusion.quantization.formats import BY_NAME, Format

CALIBRATIONS = ("auto", "max", "percentile", "mse", "entropy")
#: What 16-bit parts may compute in.
_PRECISIONS = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Target:
    """What a model in eight bits must reach: ``metric`` of it, or, where that is None, agreement with the original, at
    least ``least``."""

    least: float
    metric: Callable[[Any], Any] | None = None

    @property
    def words(self) -> str:
        return f"{'agreement' if self.metric is None else 'the metric'} ≥ {self.least:g}"


@dataclass(frozen=True)
class Settings:
    """``format`` and ``precision``: of the parts in eight and in 16 bits."""

    format: Format
    precision: torch.dtype
    batches: Iterable[Any]
    calibration: str
    target: Target


class OptionError(ValueError):
    """``option`` has a value that makes no sense, or does not go with the others."""

    def __init__(self, option: str, told: str) -> None:
        super().__init__(told)
        self.option = option

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.option, str(self))


def is_eight_bits(dtype: Any) -> bool:
    """Whether ``dtype`` asks for eight bits."""
    return isinstance(dtype, (str, torch.dtype)) and dtype in BY_NAME


def settings_for(dtype: Any, given: Mapping[str, Any], verify: bool = True) -> Settings | None:
    """The settings for ``dtype``, None for one that is none of eight bits; ``given``: the options by their names, None
    for those that were left out. TypeError or OptionError for options that do not go together."""
    if not is_eight_bits(dtype):
        _require_none(dtype, given)
        return None
    format, precision = BY_NAME[dtype], given["precision"] or torch.float16
    batches = given["calibrate"]
    if given["target"] is not None and not verify:
        raise OptionError("target", "target is reached by proof: it cannot go with verify=False")
    if precision not in _PRECISIONS:
        told = f"what is not in 8 bits is in torch.float16 or torch.bfloat16, got precision={precision!r}"
        raise OptionError("precision", told)
    if batches is None:
        raise OptionError(
            "calibrate",
            f"dtype={format.name!r} needs calibrate=, an iterable of batches as the model takes them: "
            "the ranges of activations are measured on them",
        )
    if isinstance(batches, (str, bytes, Mapping)) or not hasattr(batches, "__iter__"):
        raise TypeError(f"calibrate takes an iterable of batches, got {type(batches).__name__}")
    if isinstance(batches, torch.Tensor):
        batches = [batches]  # one batch: iterating over it would give images
    calibration = given["calibration"] or "auto"
    if calibration not in CALIBRATIONS:
        raise OptionError("calibration", f"calibration is one of {', '.join(CALIBRATIONS)}, got {calibration!r}")
    return Settings(format, precision, batches, calibration, _target(given["target"]))


def _require_none(dtype: Any, given: Mapping[str, Any]) -> None:
    if isinstance(dtype, str):
        known = ", ".join(repr(name) for name in BY_NAME if isinstance(name, str))
        raise OptionError("dtype", f"fuse() knows {known} by their names, and torch's dtypes, got {dtype!r}")
    extra = [name for name, value in given.items() if value is not None]
    if extra:
        told = (
            f"{' and '.join(extra)} {'are' if len(extra) > 1 else 'is'} for dtype='int8' or 'fp8', got dtype={dtype!r}"
        )
        raise OptionError(extra[0], told)


def _target(given: Any) -> Target:
    if given is None:
        return Target(0.99)
    metric, least = None, given
    if isinstance(given, tuple) and len(given) == 2 and callable(given[0]):
        metric, least = given
    if callable(least):
        raise OptionError("target", "a metric needs the least value that it may have: target=(metric, 0.93)")
    if isinstance(least, bool) or not isinstance(least, (int, float)):
        raise TypeError(f"target takes a number, or a metric and a number, got {given!r}")
    if not math.isfinite(least) or (metric is None and not 0 < least <= 1):
        raise OptionError("target", f"target is a share of agreement above 0 and at most 1, got {least!r}")
    return Target(float(least), metric)
