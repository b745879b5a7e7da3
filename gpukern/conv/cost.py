"""Minimum cost of a convolution and cost of a plan, predicted without a GPU. Imports neither torch nor Triton."""

from __future__ import annotations

import math
import operator

from gpukern.conv.families.registry import family_of
from gpukern.conv.geometry import dimensions, phases
from gpukern.conv.plan import ConvPlan, Direction, Operands
from gpukern.conv.problem import ConvProblem
from gpukern.ops._reduction.splits import group_count
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.roofline import Cost, Work, in_waves, window_reads

#: Bytes of an element of first, second and output.
Sizes = tuple[int, int, int]


def minimum_work(problem: ConvProblem, direction: Direction, itemsizes: int | Sizes, kind: str) -> Work:
    """Return flops = 2·N·P·Q·K·(C/groups)·R·S, and bytes of one pass over operands and output.

    ``itemsizes`` are the bytes of an element of first, second and output, one number if they are alike.

    As is usual, taps in the padding count, so that an implementation which skips them can beat the floor by their
    share: little at 56 × 56, but (21/19)² = 1.22 for 3×3 at 7 × 7. Where fewer taps than that reach the pixels of dx,
    as in an image of odd size at stride 2, the input gradient counts those.

    Only the rows and columns of the operands' images that a window covers count: 1×1 at stride 2 reads a quarter of x.
    Bias, activation and the comparisons of a pool are left out.
    """
    p = problem
    if not _output(p, direction):
        return Work(0, 0, kind)
    both = dimensions(p)
    reads = [window_reads(*dimension) for dimension in both]
    x = p.N * p.C * math.prod(len({i for _, i in pairs}) for pairs in reads)
    y = p.N * p.K * math.prod(len({o for o, _ in pairs}) for pairs in reads)
    elements = *_operands(direction, x, y, _filter(p)), _written(p, direction)
    sizes = (itemsizes,) * 3 if isinstance(itemsizes, int) else itemsizes
    taps = [dimension.outputs * dimension.taps for dimension in both]
    if direction is Direction.INPUT_GRAD:
        gathered = (sum(pixels * taps for pixels, taps in phases(dimension)) for dimension in both)
        taps = [*map(min, taps, gathered)]
    return Work(2 * p.N * math.prod(taps) * p.K * p.group_inputs, sum(map(operator.mul, elements, sizes)), kind)


def least_cost(
    problem: ConvProblem,
    direction: Direction,
    plan: ConvPlan,
    tiles: list[tuple[int, int]],
    operands: Operands,
    device: DeviceSpec,
) -> Cost:
    """Return the least cost of ``plan`` on ``device``; ValueError if the device's peaks are unknown.

    ``tiles``: pairs of (tiles, steps of ``plan.block_k`` each walks), from the kernel's own ``plan.py``. Partial sums
    of ``plan.splits`` are fp32, written and read again. A kernel that multiplies element by element runs at the rate
    outside the tensor cores, whatever the operands are.
    """
    if device.peaks is None:
        raise ValueError(f"the peak rates of {device.name} are not known")
    p, bandwidth, itemsizes = problem, device.peaks.bandwidth, operands.itemsizes
    must = minimum_work(p, direction, itemsizes, operands.kind)
    if not _output(p, direction) or not p.N:
        # Nothing is launched; a weight gradient of no images is filled with zeros.
        return Cost(0, 0.0, 1.0, must.bytes, 0, 0.0, must.bytes / bandwidth)
    step = 2 * plan.block_m * plan.block_n * plan.block_k
    done = sum(count * steps * step for count, steps in tiles)
    rate = device.peaks.matrix_rates[rate_of(plan, operands)]
    compute = in_waves([(count, steps * step) for count, steps in tiles], device.sm_count) / rate
    passes, passed = family_of(plan).extra_passes(p, operands.itemsize)
    moved = must.bytes + copied_bytes(p, direction, plan, itemsizes) + split_bytes(p, direction, plan) + passed
    programs = sum(count for count, _ in tiles)
    return Cost(
        tiles=programs,
        waves=programs / device.sm_count,
        efficiency=must.flops / done if done else 1.0,
        bytes=moved,
        launches=1 + passes + sum(plan.pack),
        compute=compute,
        seconds=max(compute, moved / bandwidth),
    )


def is_elementwise(plan: ConvPlan) -> bool:
    """Whether the kernel multiplies element by element, outside the tensor cores."""
    return plan.variant in family_of(plan).elementwise


def rate_of(plan: ConvPlan, operands: Operands) -> str:
    if is_elementwise(plan) or (operands.dtype == "float32" and plan.precision == "ieee"):
        return "fma"
    return plan.precision if operands.dtype == "float32" else operands.kind


def copied_bytes(p: ConvProblem, direction: Direction, plan: ConvPlan, itemsizes: Sizes) -> int:
    """Bytes moved by copies into or out of channels_last: each reads and writes its tensor once."""
    operands = _operands(direction, p.N * p.C * p.H * p.W, p.N * p.K * p.P * p.Q, _filter(p))
    sizes = zip((*operands, _written(p, direction)), itemsizes, plan.pack, strict=True)
    return sum(2 * elements * itemsize for elements, itemsize, copied in sizes if copied)


def split_bytes(p: ConvProblem, direction: Direction, plan: ConvPlan) -> int:
    """Bytes moved by partial sums: fp32, written and read once, as are those of groups of them."""
    if plan.splits == 1:
        return 0
    parts = plan.splits
    if direction is Direction.WEIGHT_GRAD:
        parts += group_count(plan.splits, family_of(plan).tile_sums(p, plan))
    return 2 * 4 * parts * _output(p, direction)


def _operands(direction: Direction, x: int, y: int, w: int) -> tuple[int, int]:
    """Sizes of the kernel's two operands, in its order; y stands for dy too."""
    return {Direction.FORWARD: (x, w), Direction.INPUT_GRAD: (y, w), Direction.WEIGHT_GRAD: (y, x)}[direction]


def _filter(p: ConvProblem) -> int:
    return p.K * p.group_inputs * p.R * p.S


def _written(p: ConvProblem, direction: Direction) -> int:
    """Number of elements that a launch writes."""
    return _output(p, direction) // (4 if p.pool else 1)


def _output(p: ConvProblem, direction: Direction) -> int:
    """Number of elements that a launch computes."""
    if direction is Direction.WEIGHT_GRAD:
        return _filter(p)
    return p.N * (p.K * p.P * p.Q if direction is Direction.FORWARD else p.C * p.H * p.W)
