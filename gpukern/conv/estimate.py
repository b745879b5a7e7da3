"""Estimate of a plan's running time, to choose between plans. Imports neither torch nor Triton.

:func:`gpukern.conv.cost.least_cost` is a bound that no launch beats; this estimates what one reaches:

    seconds = launch · launches + max(busy, memory) + overlap · min(busy, memory)
    memory  = bytes / (bandwidth · share)
    busy    = waves · (steps · max(products, operands, latency / stages) + first + store · area) + adding

``products`` are the seconds of a step's products for all programs that share a multiprocessor, at a share of the peak
that depends on the kernel and its tile, and ``operands`` those of fetching the operands, from the L2 at best; a
program can have the operands of ``stages`` steps in flight, so its steps come no faster than latency / stages. The
constants are fitted to measured plans by ``python -m bench.calibrate``; the plan database holds the measurements
themselves and takes precedence. ``adding`` is the time after the last product until the splits of a sum are added: a
constant, and in weight gradients, which have many more splits than other directions, also that of reading them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gpukern.conv.cost import is_elementwise, least_cost, rate_of
from gpukern.conv.families.registry import FAMILIES, family_of
from gpukern.conv.geometry import channels_of
from gpukern.conv.plan import ConvPlan, Direction, Layout, Operands, Variant
from gpukern.conv.problem import ConvProblem
from gpukern.ops._reduction.splits import parts_in_turn
from gpukern.runtime.device import DeviceSpec, assumed_peaks
from gpukern.runtime.roofline import Cost


@dataclass(frozen=True)
class Constants:
    """Times in seconds; shares are of a peak."""

    #: Time of each launch.
    launch: float
    #: Latency from requesting a step's operands to having them.
    latency: float
    #: Bytes per second that a multiprocessor fetches ...
    fetch: float
    #: ... and fetches of the stem's windows: short rows, each a request of its own.
    windows: float
    #: Time until a program's first product.
    first: float
    #: Time a program takes to store its output, for a tile of 128 × 128.
    store: float
    #: Time to add up the partial sums of a tile, without reading those of a weight gradient.
    split: float
    #: Share of the bandwidth that long copies reach.
    memory: float
    #: Share of the shorter one of products and memory that is not hidden.
    overlap: float
    #: Share of the tensor cores' peak, by kernel; outside the tensor cores, of the multiply-adds' ...
    kernels: Mapping[Variant, float]
    #: ... and by tile, (pixels, channels).
    tiles: Mapping[tuple[int, int], float]
    #: Factor for a tile with a side shorter than 64, once per halving.
    halved: float


#: Fitted to bench/results/nvidia-h200: 2,876 plans for ResNet-50's convolutions in float16, channels_last, at batch 32
#: and 128. Not measured there: grouped, and the kernels outside the tensor cores.
MEASURED = Constants(
    launch=1.18e-6,
    latency=1.14e-6,
    fetch=113e9,
    windows=25e9,
    first=1.05e-6,
    store=0.70e-6,
    split=2.5e-6,
    memory=0.88,
    overlap=0.39,
    kernels={k: share for family in FAMILIES for k, share in family.main_loop_efficiency.items()},
    tiles={
        (64, 64): 0.576,
        (128, 64): 0.581,
        (64, 128): 0.690,
        (128, 128): 0.671,
        (256, 64): 0.555,
        (256, 128): 0.722,
    },
    halved=0.56,
)

#: Reading or writing across the runs moves whole sectors of 32 bytes for single elements, most of them from the cache.
_ACROSS_RUNS = 4.0
#: Instructions for a tile's end with an output in 8 bits, over those with one in 16: of 128 × 128 sums of int8, with
#: scale, bias, residual and relu, compiled for sm_90, 1,352 beside 880. Not measured.
_NARROWING = 1.5
#: Limits of a multiprocessor with tensor cores: registers, threads, programs.
_REGISTERS, _THREADS, _PROGRAMS = 65536, 2048, 16
#: Registers of a thread besides its sums, and bytes of shared memory that each program's barriers take.
_OTHER_REGISTERS, _OTHER_SHARED_MEMORY = 48, 1024


def cost_and_seconds(
    problem: ConvProblem,
    direction: Direction,
    plan: ConvPlan,
    tiles: list[tuple[int, int]],
    operands: Operands,
    device: DeviceSpec,
    constants: Constants = MEASURED,
) -> tuple[Cost, float]:
    """Return (the bound of ``plan``, the seconds it is expected to take)."""
    peaks = assumed_peaks(device)
    bound = least_cost(problem, direction, plan, tiles, operands, replace(device, peaks=peaks))
    return bound, expected(problem, direction, plan, tiles, operands, device, bound, constants)


def expected(
    problem: ConvProblem,
    direction: Direction,
    plan: ConvPlan,
    tiles: list[tuple[int, int]],
    operands: Operands,
    device: DeviceSpec,
    bound: Cost,
    constants: Constants,
) -> float:
    """Return the expected seconds; ``bound`` is the plan's :func:`gpukern.conv.cost.least_cost`."""
    if not bound.launches:
        return bound.seconds
    peaks = assumed_peaks(device)
    memory = bound.bytes / peaks.bandwidth / constants.memory
    if is_elementwise(plan):
        busy = bound.compute / constants.kernels[plan.variant]
    else:
        rate = peaks.matrix_rates[rate_of(plan, operands)] / device.sm_count
        busy = _busy(plan, tiles, rate, operands.itemsizes, device, constants)
        busy += _adding(problem, direction, plan, constants)
    across = _ACROSS_RUNS ** _across_runs(problem, direction, plan, operands)
    longer, shorter = sorted((across * busy, across * memory), reverse=True)
    return constants.launch * bound.launches + longer + constants.overlap * shorter


def pass_seconds(bytes_moved: float, device: DeviceSpec) -> float:
    """Return the expected seconds of a launch that does little but move so many bytes."""
    return bytes_moved / (MEASURED.memory * assumed_peaks(device).bandwidth) + MEASURED.launch


def resident(plan: ConvPlan, itemsizes: tuple[int, int, int], device: DeviceSpec) -> int:
    """Number of programs of ``plan`` that fit on a multiprocessor; ``itemsizes`` as :attr:`Operands.itemsizes`."""
    if family_of(plan).one_program_per_sm:
        return 1
    threads = 32 * plan.num_warps
    registers = plan.block_m * plan.block_n // threads + _OTHER_REGISTERS
    buffers = plan.num_stages * _step_bytes(plan, itemsizes) + _OTHER_SHARED_MEMORY
    limits = device.shared_memory // buffers, _REGISTERS // (threads * registers), _THREADS // threads, _PROGRAMS
    return max(1, min(limits))


def _step_bytes(plan: ConvPlan, itemsizes: tuple[int, int, int]) -> int:
    """Bytes of the operands of one step."""
    return (plan.block_m * itemsizes[0] + plan.block_n * itemsizes[1]) * plan.block_k


def _busy(
    plan: ConvPlan,
    tiles: list[tuple[int, int]],
    rate: float,
    itemsizes: tuple[int, int, int],
    device: DeviceSpec,
    constants: Constants,
) -> float:
    """Seconds until the last sum is complete, if memory were infinitely fast; ``rate`` is a multiprocessor's."""
    programs = sum(count for count, _ in tiles)
    steps = sum(count * steps for count, steps in tiles) / programs
    together = min(resident(plan, itemsizes, device), math.ceil(programs / device.sm_count))
    area = plan.block_m * plan.block_n
    products = together * 2 * area * plan.block_k / (rate * _share(plan, constants))
    rate_of_fetching = constants.windows if family_of(plan).fetches_short_rows else constants.fetch
    fetched = together * _step_bytes(plan, itemsizes) / rate_of_fetching
    step = max(products, fetched, constants.latency / max(plan.num_stages, 1))
    waves = programs / (device.sm_count * together)
    if waves <= 3:
        # The more waves there are, the less it matters that they do not end together.
        waves = max(1.0, (waves + math.ceil(waves)) / 2)
    store = constants.store * (_NARROWING if itemsizes[2] == 1 else 1.0)
    return waves * (steps * step + constants.first + store * area / 128**2)


def _adding(problem: ConvProblem, direction: Direction, plan: ConvPlan, constants: Constants) -> float:
    """Seconds from the end of the last product until the splits of its tile are added."""
    if plan.splits == 1:
        return 0.0
    if direction is not Direction.WEIGHT_GRAD:
        return constants.split
    size = family_of(plan).tile_sums(problem, plan)
    return constants.split + 4 * size * parts_in_turn(plan.splits, size) / constants.fetch


def _share(plan: ConvPlan, constants: Constants) -> float:
    """Share of the peak rate of products that ``plan`` reaches."""
    share, sides = constants.kernels[plan.variant], []
    for side in (plan.block_m, plan.block_n):
        while side < 64:
            share, side = share * constants.halved, side * 2
        # A side that is not a power of two counts as the next smaller one.
        sides.append(min(1 << side.bit_length() - 1, 256))
    pixels, channels = sides
    if channels == 256:
        # Not fitted on its own: use the tile with as many sums.
        pixels, channels = min(2 * pixels, 256), 128
    return share * constants.tiles[pixels, channels]


def _across_runs(problem: ConvProblem, direction: Direction, plan: ConvPlan, operands: Operands) -> int:
    """Number of tensors that a matrix product of implicit GEMM accesses across their runs of channels."""
    if plan.variant not in family_of(plan).across_runs:
        return 0
    seen = operands.packed(plan.pack, channels_of(problem, direction))
    return sum(layout in (Layout.NCHW, Layout.STRIDED) for layout in (seen.first, seen.second, seen.output))
