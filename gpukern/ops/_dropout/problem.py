"""Dropout as a problem: what is kept, and the order in which a kernel walks through its tensors."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

from gpukern.runtime.strides import joined

Shape = tuple[int, ...]


class Chance(NamedTuple):
    """An element is dropped where its number, of 32 random bits, is below ``threshold``; else it is multiplied."""

    threshold: int
    scale: float


@functools.lru_cache(maxsize=256)
def chance(p: float) -> Chance:
    """Return what drops with probability ``p`` and keeps the mean. Of p = 1 nothing is kept, whatever the number."""
    return Chance(min(round(p * 2**32), 2**32 - 1), 1 / (1 - p) if p < 1 else 0.0)


# eq=False: walks are made once for each set of strides (the function below keeps them), so identity is equality.
@dataclass(frozen=True, eq=False)
class Walk:
    """Elements in the memory order of the result: ``sizes`` of four dimensions, and the operands' strides along them.

    ``flat``: all operands lie in that order too, without a gap.
    """

    flat: bool
    sizes: Shape
    strides: tuple[Shape, ...]


@functools.lru_cache(maxsize=4096)
def walk(shape: Shape, order: Shape, strides: tuple[Shape, ...]) -> Walk | None:
    """Return the walk through operands of ``strides`` beside a result whose dimensions lie in ``order``.

    None where more than four dimensions are left that cannot be joined.
    """
    order = order or tuple(range(len(shape)))
    sizes, steps = joined([shape[i] for i in order], [tuple(each[i] for i in order) for each in strides])
    if not sizes or (len(sizes) == 1 and all(each == [1] for each in steps)):
        return Walk(True, (1,) * 4, ((0,) * 4,) * len(strides))
    missing = 4 - len(sizes)
    if missing < 0:
        return None
    return Walk(False, (1,) * missing + tuple(sizes), tuple((0,) * missing + tuple(each) for each in steps))
