"""Planner of the input pipeline: division of images into programs. Imports neither torch nor Triton."""

from __future__ import annotations

from typing import NamedTuple

from gpukern.runtime.integers import cdiv

#: Elements of a thread: two stores of 16 bytes of halves, four of fp32. Each thread makes its image's random numbers
#: again, which takes as long as three or four elements.
_A_THREAD = 16
_WARPS = (4, 2, 1)


class AugmentPlan(NamedTuple):
    """``block``: the elements of a program; ``blocks``: the programs of an image."""

    block: int
    warps: int
    blocks: int


def plan(size: int) -> AugmentPlan:
    """Return the plan for images of ``size`` elements: the largest programs of those that leave the fewest idle."""
    plans = [AugmentPlan(block, warps, cdiv(size, block)) for warps in _WARPS for block in (warps * 32 * _A_THREAD,)]
    return min(plans, key=lambda each: each.block * each.blocks)
