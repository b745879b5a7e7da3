"""Plans for convolutions whose windows do not overlap. Imports neither torch nor Triton."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

from gpukern.conv.plan import ConvPlan, Direction, Operands
from gpukern.conv.volumes import planner
from gpukern.conv.volumes.problem import VolumeProblem
from gpukern.runtime.device import DeviceSpec


def is_product(p: VolumeProblem, direction: Direction) -> bool:
    """Whether the convolution is one matrix product: no two windows share an element, and no padding is read."""
    apart = all(taps <= step for taps, step in zip(p.taps, p.stride, strict=True))
    if p.groups != 1 or not apart or any(p.padding) or p.dilation != (1, 1, 1):
        return False
    # What is in no window has a gradient too, zero, which the product does not write.
    windows = tuple(step * outputs for step, outputs in zip(p.stride, p.result, strict=True))
    return direction is not Direction.INPUT_GRAD or (p.taps == p.stride and windows == p.image)


@functools.lru_cache(maxsize=4096)
def plan(
    problem: VolumeProblem,
    direction: Direction,
    dtype: str,
    precision: str,
    in_runs: bool,
    out_in_runs: bool,
    device: DeviceSpec,
) -> ConvPlan:
    """Return the plan of the same product as a 1×1×1 convolution; only the weight gradient's sum is split.

    ``in_runs``: whether both operands can be read in runs of 16 bytes; ``out_in_runs``: whether the output is written
    in such. Without, tiles are smaller, because of the addresses; found by compiling for sm_80 and sm_90.
    """
    product, operands = as_one_tap(problem), Operands(dtype, precision)
    offered = list(planner.candidates(product, direction, operands, device))
    if direction is not Direction.WEIGHT_GRAD:
        offered = [each for each in offered if each.splits == 1]
    if not in_runs:
        offered = [planner.without_runs(each) for each in offered]
    elif not out_in_runs:
        offered = [replace(each, block_m=min(each.block_m, 64)) for each in offered]
    return planner.fastest(offered, product, direction, operands, device)


def as_one_tap(p: VolumeProblem) -> VolumeProblem:
    """Return the 1×1×1 convolution whose channels are those of all taps."""
    one = (1, 1, 1)
    return replace(p, C=p.C * math.prod(p.taps), image=p.result, taps=one, stride=one)
