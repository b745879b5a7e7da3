"""What a convolution must cost, and what a plan for it does: predictions that need no GPU. No torch, no Triton."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

from gpukern.ops._conv2d.plan import ConvPlan, Direction, Variant, grid, tiled_pixels
from gpukern.ops._conv2d.problem import ConvProblem
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.integers import cdiv
from gpukern.runtime.roofline import Cost, Work, in_waves, window_reads


def work(problem: ConvProblem, direction: Direction, itemsize: int, kind: str) -> Work:
    """flops = 2·N·P·Q·K·(C/groups)·R·S, and one pass over the operands and the output of ``itemsize`` bytes.

    As is usual, taps in the padding count, so that an implementation which skips them can beat the floor by their
    share: little at 56 × 56, but (21/19)² = 1.22 for 3×3 at 7 × 7. Where fewer taps than that reach the pixels of dx,
    as in an image of odd size at stride 2, the input gradient counts those.

    Of the operands' images only rows and columns that a window meets count: 1×1 at stride 2 reads a quarter of x.
    Bias and activation are left out.
    """
    p = problem
    if not _output(p, direction):
        return Work(0, 0, kind)
    dimensions = _dimensions(p)
    reads = [window_reads(*dimension) for dimension in dimensions]
    x = p.N * p.C * math.prod(len({i for _, i in pairs}) for pairs in reads)
    y = p.N * p.K * math.prod(len({o for o, _ in pairs}) for pairs in reads)
    elements = sum(_operands(direction, x, y, _filter(p))) + _output(p, direction)
    taps = [dimension.outputs * dimension.taps for dimension in dimensions]
    if direction is Direction.INPUT_GRAD:
        gathered = (sum(pixels * taps for pixels, taps in _phases(dimension)) for dimension in dimensions)
        taps = map(min, taps, gathered)
    return Work(2 * p.N * math.prod(taps) * p.K * p.group_inputs, elements * itemsize, kind)


def cost(
    problem: ConvProblem,
    direction: Direction,
    plan: ConvPlan,
    itemsize: int,
    packed: tuple[bool, bool],
    device: DeviceSpec,
    kind: str,
) -> Cost:
    """The cost of ``plan`` on ``device``, whose peaks must be known (ValueError).

    ``packed``: which operand is first copied into runs of channels, in the order of the kernel's arguments: x and w, dy
    and w, or dy and x (:attr:`gpukern.ops._conv2d.prepare.Prepared.pack`). Partial sums of ``plan.splits`` are fp32,
    written and read again by a second launch. Element by element, the kernel has the rate of float32 whatever ``kind``.
    """
    if device.peaks is None:
        raise ValueError(f"the peak rates of {device.name} are not known")
    p, bandwidth = problem, device.peaks.bandwidth
    must = work(p, direction, itemsize, kind)
    if not _output(p, direction) or not p.N:
        # Nothing is launched; a weight gradient of no images is filled with zeros.
        return Cost(0, 0.0, 1.0, must.bytes, 0, must.bytes / bandwidth)
    operands = _operands(direction, p.N * p.C * p.H * p.W, p.N * p.K * p.P * p.Q, _filter(p))
    copied = sum(elements for elements, copy in zip(operands, packed, strict=True) if copy)
    partial = plan.splits * _filter(p) if plan.splits > 1 else 0
    moved = must.bytes + 2 * copied * itemsize + 2 * partial * 4

    tiles, groups, layers = grid(p, direction, plan)
    step = 2 * plan.block_m * plan.block_n * plan.block_k
    programs = [(tiles * groups, steps * step) for steps in _steps(p, direction, plan)]
    done = sum(count * flops for count, flops in programs)
    rate = device.peaks.matrix_rates["float32" if plan.variant is Variant.DIRECT else kind]
    compute = in_waves(programs, device.sm_count) / rate
    return Cost(
        tiles=tiles * groups * layers,
        waves=tiles * groups * layers / device.sm_count,
        efficiency=must.flops / done if done else 1.0,
        bytes=moved,
        launches=1 + sum(packed) + (plan.splits > 1),
        seconds=max(compute, moved / bandwidth),
    )


def _steps(p: ConvProblem, direction: Direction, plan: ConvPlan) -> list[int]:
    """Steps along the sum of a tile of each phase or split, as the kernels loop."""
    if direction is Direction.WEIGHT_GRAD:
        pixels, _ = tiled_pixels(p, direction)
        share = cdiv(pixels, plan.splits)
        # Rounded up, the shares can leave little for the last splits, or nothing.
        shares = (min(share, max(pixels - i * share, 0)) for i in range(plan.splits))
        return [cdiv(pixels, plan.block_k) for pixels in shares]
    reduction, taps = p.group_inputs, [p.R * p.S]
    if direction is Direction.INPUT_GRAD:
        # A phase has as many tiles as the largest one, and those without a pixel walk their taps all the same.
        phases = itertools.product(*map(_phases, _dimensions(p)))
        reduction, taps = p.group_outputs, [r * s for (_, r), (_, s) in phases]
    if plan.variant is Variant.FLAT:
        return [cdiv(n * reduction, plan.block_k) for n in taps]
    return [n * cdiv(reduction, plan.block_k) for n in taps]


class _Dimension(NamedTuple):
    """One dimension of a convolution; ``before`` is the padding above or to the left."""

    inputs: int
    outputs: int
    taps: int
    stride: int
    dilation: int
    before: int


def _dimensions(p: ConvProblem) -> tuple[_Dimension, _Dimension]:
    return (
        _Dimension(p.H, p.P, p.R, p.stride[0], p.dilation[0], p.padding[0]),
        _Dimension(p.W, p.Q, p.S, p.stride[1], p.dilation[1], p.padding[2]),
    )


def _phases(d: _Dimension) -> list[tuple[int, int]]:
    """(positions in dx, taps that reach each of them) by position modulo the stride."""
    return [
        (
            len(range(phase, d.inputs, d.stride)),
            sum((phase + d.before - tap * d.dilation) % d.stride == 0 for tap in range(d.taps)),
        )
        for phase in range(d.stride)
    ]


def _operands(direction: Direction, x: int, y: int, w: int) -> tuple[int, int]:
    """The two that the kernel takes, in its order; y stands for dy too."""
    return {Direction.FORWARD: (x, w), Direction.INPUT_GRAD: (y, w), Direction.WEIGHT_GRAD: (y, x)}[direction]


def _filter(p: ConvProblem) -> int:
    return p.K * p.group_inputs * p.R * p.S


def _output(p: ConvProblem, direction: Direction) -> int:
    """Elements of what a launch writes."""
    if direction is Direction.WEIGHT_GRAD:
        return _filter(p)
    return p.N * (p.K * p.P * p.Q if direction is Direction.FORWARD else p.C * p.H * p.W)
