"""Planner of dropout: division into programs. Imports neither torch nor Triton."""

from __future__ import annotations

import functools
from typing import NamedTuple

from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.integers import cdiv

#: Elements of a thread: two loads of 16 bytes of halves, four of fp32. And the most warps of a program.
_A_THREAD, _WARPS = 16, 4
_PROGRAMS_PER_SM = 4


class DropoutPlan(NamedTuple):
    """``block``: the elements of a program."""

    block: int
    warps: int
    programs: int


@functools.lru_cache(maxsize=4096)
def plan(size: int, device: DeviceSpec) -> DropoutPlan:
    """Return the plan for ``size`` elements: small programs where large ones would leave multiprocessors idle."""
    warps = _WARPS
    while warps > 1 and size < _PROGRAMS_PER_SM * device.sm_count * warps * 32 * _A_THREAD:
        warps //= 2
    block = warps * 32 * _A_THREAD
    return DropoutPlan(block, warps, cdiv(size, block))
