"""Learning rates as functions of the step: the same after a resume, whatever ran in between."""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("constant", "step", "cosine", "one-cycle")
#: Of the one-cycle policy: the share of steps that rise, the rate it rises from as a share of the largest, and where it
#: ends as a share of the former (Smith and Topin, "Super-convergence", 2018).
_RISING, _FIRST, _LAST = 0.3, 1 / 25, 1e-4


@dataclass(frozen=True)
class Schedule:
    """The learning rate of a step, in units of the optimizer's.

    =============  =====================================================================
    ``name``       factor at step t of T
    =============  =====================================================================
    ``constant``   1
    ``step``       ``gamma`` to the power of ⌊t / ``every``⌋
    ``cosine``     ½ (1 + cos(π t/T))
    ``one-cycle``  half a cosine from 1/25 up to 1, and half a one down to 4e-6
    =============  =====================================================================

    For ``warmup`` steps before it, the factor rises linearly to 1.
    """

    name: str
    total: int
    warmup: int = 0
    every: int = 1
    gamma: float = 0.1

    def factor(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        step, total = step - self.warmup, max(1, self.total - self.warmup)
        if self.name == "step":
            return self.gamma ** (step // self.every)
        if self.name == "cosine":
            return (1 + math.cos(math.pi * min(step / total, 1))) / 2
        return _one_cycle(step, total) if self.name == "one-cycle" else 1.0


def _one_cycle(step: int, total: int) -> float:
    top, end = _RISING * total - 1, max(1, total - 1)
    if top > 0 and step <= top:
        return _cosine(_FIRST, 1.0, step / top)
    return _cosine(1.0, _FIRST * _LAST, min((step - top) / (end - top), 1.0))


def _cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) / 2 * (1 + math.cos(math.pi * share))
