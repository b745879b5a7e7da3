"""The time a plan is expected to take, to choose between plans. No torch, no Triton.

:func:`gpukern.ops._conv2d.cost.cost` is a bound that no launch beats; this is a guess at what one reaches. Its numbers
are estimates, not measurements: shares of the peak that tiles of a size reach follow from the traffic between shared
memory and the tensor cores, the others from the length of the compiled main loops. The plan database holds what was
measured, and goes before.
"""

from __future__ import annotations

from dataclasses import replace

from gpukern.ops._conv2d.cost import ELEMENTWISE, cost
from gpukern.ops._conv2d.geometry import channels_of
from gpukern.ops._conv2d.plan import ConvPlan, Direction, Layout, Operands, Variant
from gpukern.ops._conv2d.problem import ConvProblem
from gpukern.runtime.device import DeviceSpec, assumed_peaks
from gpukern.runtime.roofline import Cost

#: Share of the tensor cores' peak by the longer and the shorter side of a tile: every operand that is read from shared
#: memory serves as many products as the other side is long.
_TILE_SHARE = {(64, 64): 0.50, (128, 64): 0.61, (256, 64): 0.69, (128, 128): 0.80, (256, 128): 0.90}
#: Of a tile with a side shorter than these, for every halving.
_HALVED = 0.6
#: What a variant's main loop leaves of that: address arithmetic beside the products.
_LOOP_SHARE = {
    Variant.TAPS: 0.85,
    Variant.FLAT: 0.12,
    Variant.DIRECT: 0.10,
    Variant.GEMM: 1.0,
    Variant.BOX: 1.0,
    Variant.BATCH_BOX: 0.95,
    Variant.STEM: 0.9,
    Variant.GROUPED: 0.7,
    Variant.DEPTHWISE: 0.4,
    Variant.WARP_SPECIALIZED: 1.0,
}
#: Of the bandwidth: what long copies reach.
_MEMORY_SHARE = 0.9
#: Seconds before the first product and after the last, of each launch.
_LAUNCH = 2.0e-6
#: Seconds from asking for a step's operands to having them: steps of one tile come no faster than this / stages.
_LATENCY = 0.8e-6
#: Reading or writing across the runs moves whole sectors of 32 bytes for single elements, most of them from the cache.
_ACROSS_RUNS = 4.0


def estimate(
    problem: ConvProblem,
    direction: Direction,
    plan: ConvPlan,
    tiles: list[tuple[int, int]],
    operands: Operands,
    device: DeviceSpec,
) -> tuple[Cost, float]:
    """(the bound of ``plan``, the seconds it is expected to take)."""
    peaks = assumed_peaks(device)
    bound = cost(problem, direction, plan, tiles, operands, replace(device, peaks=peaks))
    if not bound.launches:
        return bound, bound.seconds
    memory = bound.bytes / peaks.bandwidth
    compute = bound.compute / _share(plan)
    across = _across_runs(problem, direction, plan, operands)
    memory *= _ACROSS_RUNS**across / _MEMORY_SHARE
    compute *= _ACROSS_RUNS**across
    steps = max((steps for _, steps in tiles), default=0)
    waves = max(1.0, bound.waves)
    latency = waves * steps * _LATENCY / max(plan.num_stages, 1) if plan.variant not in ELEMENTWISE else 0.0
    # Tiles that share a multiprocessor hide one another's waiting.
    latency /= min(waves, 2.0)
    busy = max(compute, latency)
    return bound, max(busy, memory) + 0.15 * min(busy, memory) + _LAUNCH * bound.launches


def pass_seconds(bytes_moved: int, device: DeviceSpec) -> float:
    """What a launch is expected to take that does little but move so much."""
    return bytes_moved / (_MEMORY_SHARE * assumed_peaks(device).bandwidth) + _LAUNCH


def _share(plan: ConvPlan) -> float:
    share = _LOOP_SHARE[plan.variant]
    if plan.variant in ELEMENTWISE:
        return share
    longer, shorter = max(plan.block_m, plan.block_n), min(plan.block_m, plan.block_n)
    while shorter < 64:
        share, shorter = share * _HALVED, shorter * 2
    while longer < 64:
        share, longer = share * _HALVED, longer * 2
    # Of no power of two, those of the next smaller.
    longer, shorter = (1 << side.bit_length() - 1 for side in (longer, shorter))
    return share * _TILE_SHARE[min(longer, 256), min(shorter, 128)]


def _across_runs(problem: ConvProblem, direction: Direction, plan: ConvPlan, operands: Operands) -> int:
    """How many tensors a matrix product of the gather touches across their runs of channels."""
    if plan.variant is not Variant.TAPS:
        return 0
    seen = operands.packed(plan.pack, channels_of(problem, direction))
    return sum(layout in (Layout.PLANES, Layout.STRIDED) for layout in (seen.first, seen.second, seen.output))
