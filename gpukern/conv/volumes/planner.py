"""Plans for convolutions of volumes. Imports neither torch nor Triton."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

from gpukern.conv.estimate import cost_and_seconds
from gpukern.conv.families.implicit_gemm.plan import FAMILY
from gpukern.conv.plan import ConvPlan, Direction, Operands, Variant
from gpukern.conv.volumes.problem import VolumeProblem, as_images, tiled_voxels
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.integers import cdiv


@functools.lru_cache(maxsize=4096)
def plan(problem: VolumeProblem, direction: Direction, operands: Operands, device: DeviceSpec) -> ConvPlan:
    """Return the candidate expected to be the fastest: that of implicit GEMM for the same tiles and sums of images."""
    images = as_images(problem)

    def seconds(plan: ConvPlan) -> float:
        tiles = FAMILY.tiles(images, direction, plan)
        return cost_and_seconds(images, direction, plan, tiles, operands, device)[1]

    return min(candidates(problem, direction, operands, device), key=seconds)


def candidates(
    problem: VolumeProblem, direction: Direction, operands: Operands, device: DeviceSpec
) -> Iterator[ConvPlan]:
    """Yield every plan that a launch may have."""
    in_full = operands.dtype == "float32" and operands.precision == "ieee"
    for precision in ("ieee", "tf32x3") if in_full else (operands.precision,):
        offered = FAMILY.candidates(as_images(problem), direction, replace(operands, precision=precision), device)
        for candidate in offered:
            if not FAMILY.needs_measurement(candidate):
                yield replace(candidate, precision=precision)


def grid(p: VolumeProblem, direction: Direction, plan: ConvPlan) -> tuple[int, int, int]:
    """Return the grid of a launch, as :func:`gpukern.conv.families.implicit_gemm.plan.grid`."""
    direct, flat = plan.variant is Variant.DIRECT, plan.variant is Variant.FLAT
    groups, spanned = (1, p.groups) if direct else (p.groups, 1)
    voxels, phases = tiled_voxels(p, direction)
    if direction is not Direction.WEIGHT_GRAD:
        columns = p.group_outputs if direction is Direction.FORWARD else p.group_inputs
        return cdiv(voxels, plan.block_m) * cdiv(columns * spanned, plan.block_n), groups, phases * plan.splits
    taps, channels = p.taps[0] * p.taps[1] * p.taps[2], p.group_inputs
    columns = cdiv(taps * channels, plan.block_n) if flat else taps * cdiv(channels, plan.block_n)
    return cdiv(p.group_outputs * spanned, plan.block_m) * columns, groups, plan.splits
