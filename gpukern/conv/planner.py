"""Planner: a launch as a pure function of problem, operands and device. Imports neither torch nor Triton."""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from gpukern.conv.estimate import cost_and_seconds
from gpukern.conv.exclusions import Exclusion, exclusion
from gpukern.conv.families.registry import FAMILIES, family_of
from gpukern.conv.geometry import channels_of
from gpukern.conv.plan import ConvPlan, Direction, Layout, Operands, Pack
from gpukern.conv.problem import ConvProblem
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.roofline import Cost


def only_measured(plan: ConvPlan) -> bool:
    """Whether nothing but a GPU can show that ``plan`` is right: it is chosen only if the plan database has it."""
    return family_of(plan).needs_measurement(plan)


@dataclass(frozen=True)
class Ranked:
    """A plan, the bound of its cost, and the seconds it is expected to take."""

    plan: ConvPlan
    cost: Cost
    seconds: float


@functools.lru_cache(maxsize=4096)
def heuristic_plan(problem: ConvProblem, direction: Direction, operands: Operands, device: DeviceSpec) -> ConvPlan:
    """Return the plan expected to be the fastest, ignoring measurements; RuntimeError if all are switched off."""
    for each in ranking(problem, direction, operands, device):
        if not only_measured(each.plan):
            return each.plan
    reasons = "; ".join(f"{each}: {each.reason}" for each in switched_off(problem, direction, operands, device))
    raise RuntimeError(f"gpukern has no kernel left for {direction.value} of {problem} on {device.name}: {reasons}")


@functools.lru_cache(maxsize=4096)
def norm_grad_plan(
    problem: ConvProblem, operands: Operands, device: DeviceSpec, activation: str, first: ConvPlan
) -> ConvPlan | None:
    """Return the plan of an input gradient that goes on through a batch norm; None if launches apart serve it.

    That is ``first``, the plan of the input gradient alone, or else the best whose kernel has registers left for it.
    What is packed is not yet the output when the kernel ends.
    """
    direction = Direction.INPUT_GRAD
    if not problem.N or first.pack[2]:
        return None
    others = (each.plan for each in ranking(problem, direction, operands, device) if not only_measured(each.plan))
    for plan in itertools.chain((first,), others):
        if not plan.pack[2] and family_of(plan).takes_norm_grad(plan, activation):
            return plan
    return None


def ranking(problem: ConvProblem, direction: Direction, operands: Operands, device: DeviceSpec) -> list[Ranked]:
    """Return every candidate, the one expected to be the fastest first."""
    offered = dict.fromkeys(candidates(problem, direction, operands, device))
    found = (ranked(problem, direction, candidate, operands, device) for candidate in offered)
    return sorted(found, key=lambda each: each.seconds)


def ranked(
    problem: ConvProblem, direction: Direction, plan: ConvPlan, operands: Operands, device: DeviceSpec
) -> Ranked:
    """Return ``plan`` with its cost, whether or not it is a candidate."""
    tiles = family_of(plan).tiles(problem, direction, plan)
    return Ranked(plan, *cost_and_seconds(problem, direction, plan, tiles, operands, device))


def candidates(
    problem: ConvProblem, direction: Direction, operands: Operands, device: DeviceSpec
) -> Iterator[ConvPlan]:
    """Yield every kernel's plans, with operands as they are or copied into channels_last; none that is switched off."""
    return (each for each in _all(problem, direction, operands, device) if exclusion(each, device) is None)


def switched_off(
    problem: ConvProblem, direction: Direction, operands: Operands, device: DeviceSpec
) -> dict[Exclusion, int]:
    """Return the exclusions that keep plans of this problem from being candidates, and how many each excludes."""
    applied = (exclusion(each, device) for each in _all(problem, direction, operands, device))
    return dict(collections.Counter(filter(None, applied)))


def _all(problem: ConvProblem, direction: Direction, operands: Operands, device: DeviceSpec) -> Iterator[ConvPlan]:
    in_full = operands.dtype == "float32" and operands.precision == "ieee"
    general, *others = FAMILIES
    if not problem.N:
        families = [general]  # an empty batch launches nothing: use the family that supports every problem
    elif problem.pool:
        # Ties go to the first: among families that pool, one made for the problem.
        families = [family for family in (*others, general) if family.can_pool]
    else:
        families = [general, *others]
    if operands.quantized:
        families = [family for family in families if family.takes_quantized]
    channels = channels_of(problem, direction)
    # Bytes are multiplied in runs along the sum, across a transposed convolution's filter in channels_last.
    keeps_filter = operands.itemsize == 1 and direction is Direction.INPUT_GRAD
    for pack in packs(operands, channels):
        if keeps_filter and pack[1]:
            continue
        seen = operands.packed(pack, channels)
        for precision in ("ieee", "tf32x3") if in_full else (operands.precision,):
            for family in families:
                for candidate in family.candidates(problem, direction, replace(seen, precision=precision), device):
                    plan = replace(candidate, pack=pack, precision=precision)
                    if _leaves_registers(plan, device):
                        yield plan


def _leaves_registers(plan: ConvPlan, device: DeviceSpec) -> bool:
    """Whether the sums of a tile read by descriptors leave registers for its operands, if they need any.

    Tiles are Hopper's, whose operands stay in shared memory. Found by compiling for sm_120: with 96 sums a thread none
    spill, with 192 some do; beside operands that are split into halves, with 32 none spill, with 64 some do.
    """
    if device.multiplies_from_shared_memory or not family_of(plan).uses_descriptors:
        return True
    return plan.sums_per_thread <= (32 if plan.precision == "tf32x3" else 96)


def packs(operands: Operands, channels: tuple[int, int, int]) -> Iterator[Pack]:
    """Yield the tensors to copy, none first: ties go to the first."""
    runs = Layout.NHWC, Layout.NHWC_STRIDED, Layout.CHANNELS
    first, second, output = (
        # A copy of few channels would still have runs too short to matter.
        (False,) if layout in runs or count < 8 else (False, True)
        for layout, count in zip((operands.first, operands.second, operands.output), channels, strict=True)
    )
    return itertools.product(first, second, output)
