"""Plans for convolutions of volumes. Imports neither torch nor Triton."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import replace

from gpukern.conv.estimate import cost_and_seconds
from gpukern.conv.families.implicit_gemm.plan import FAMILY
from gpukern.conv.geometry import channels_of
from gpukern.conv.plan import ConvPlan, Direction, Layout, Operands, Variant
from gpukern.conv.planner import packs
from gpukern.conv.volumes.problem import VolumeProblem, as_images, tiled_voxels
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.integers import cdiv


@functools.lru_cache(maxsize=4096)
def plan(problem: VolumeProblem, direction: Direction, operands: Operands, device: DeviceSpec) -> ConvPlan:
    """Return the candidate expected to be the fastest."""
    return fastest(candidates(problem, direction, operands, device), problem, direction, operands, device)


def fastest(
    offered: Iterable[ConvPlan], problem: VolumeProblem, direction: Direction, operands: Operands, device: DeviceSpec
) -> ConvPlan:
    """Return the plan expected to take the least time: that of images with the same tiles and sums."""
    images = as_images(problem)

    def seconds(plan: ConvPlan) -> float:
        tiles = FAMILY.tiles(images, direction, plan)
        return cost_and_seconds(images, direction, plan, tiles, operands, device)[1]

    return min(offered, key=seconds)


def candidates(
    problem: VolumeProblem, direction: Direction, operands: Operands, device: DeviceSpec
) -> Iterator[ConvPlan]:
    """Yield the plans of implicit GEMM, with operands as they are or copied into channels_last_3d."""
    in_full = operands.dtype == "float32" and operands.precision == "ieee"
    images = as_images(problem)
    channels = channels_of(images, direction)
    for pack in packs(operands, channels):
        seen = operands.packed(pack, channels)
        for precision in ("ieee", "tf32x3") if in_full else (operands.precision,):
            for candidate in FAMILY.candidates(images, direction, replace(seen, precision=precision), device):
                if FAMILY.needs_measurement(candidate):
                    continue
                if candidate.variant is Variant.TAPS and Layout.STRIDED in (seen.first, seen.second):
                    candidate = without_runs(candidate)
                elif operands.dtype == "float32" and not device.multiplies_from_shared_memory:
                    # Operands of four bytes in registers, beside three numbers for each tap: 64 × 64 spills.
                    candidate = replace(candidate, block_n=min(candidate.block_n, 32))
                yield replace(candidate, pack=pack, precision=precision)


def without_runs(plan: ConvPlan) -> ConvPlan:
    """Return ``plan`` with a tile for operands each element of which has an address: larger ones spill.

    Found by compiling for sm_80 and sm_90.
    """
    return replace(
        plan, block_m=min(plan.block_m, 64), block_n=min(plan.block_n, 32), block_k=min(plan.block_k, 32)
    )  # fmt: skip


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
