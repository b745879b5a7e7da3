"""Plans for implicit GEMM: kernels for every device, layout and geometry, which read each tap's pixels by pointer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from gpukern.conv.families.family import Family
from gpukern.conv.geometry import dimensions, gemm_mnk, phases, tiled_pixels
from gpukern.conv.plan import ConvPlan, Direction, Operands, Variant
from gpukern.conv.problem import ConvProblem
from gpukern.ops._reduction.splits import pixel_splits
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.integers import cdiv, power_of_two, shares

# More are candidates for measurements only, see _needs_measurement.
MAX_WARPS = 4
# The tile that benefits from them: M, N, stages.
_WIDE_TILE = (128, 128, 4)

# Below this many channels a group, tensor-core tiles (16 at least) are mostly padding: multiply element by element.
_DIRECT_CHANNELS = 8
# Below this many channels one step of 16 or more along the sum would be mostly padding: join the taps to the channels.
_FLAT_CHANNELS = 16

_Tiles = tuple[tuple[int, int], ...]
# Tiles M × N. Addresses of a flat sum and fp32 operands split in three products fill the registers, and before Hopper
# the operands do too: tiles larger than these spill.
_TILES: _Tiles = ((128, 64), (64, 64), (64, 32), (32, 32), (16, 32))
# Where steps reach past the channels, or the output comes in runs of less than 16 bytes, addresses and masks fill them.
_NARROW_TILES: _Tiles = ((64, 32), (32, 32), (16, 32))
_FLAT_TILES: _Tiles = ((64, 32), (32, 32), (16, 32))
_FULL_FP32_TILES: _Tiles = ((64, 64), (64, 32), (16, 32))
_FLAT_FULL_FP32_TILES: _Tiles = ((32, 32), (16, 32))


def candidates(p: ConvProblem, direction: Direction, operands: Operands, device: DeviceSpec) -> Iterator[ConvPlan]:
    if direction is Direction.WEIGHT_GRAD:
        yield from _weight_grad(p, operands, device)
    else:
        yield from _gather(p, direction, operands, device)


def _gather(p: ConvProblem, direction: Direction, operands: Operands, device: DeviceSpec) -> Iterator[ConvPlan]:
    M, N, K = gemm_mnk(p, direction)
    _, phases = tiled_pixels(p, direction)
    if p.groups > 1 and min(N, K) < _DIRECT_CHANNELS:
        block_n = power_of_two(N * p.groups, 1, 64)
        if p.pool:
            return
        # 16 elements a thread, if the columns fill a tile. Found by compiling: some with 4 and with 8 spill.
        block_m = power_of_two(M, 1, 2048 // block_n if block_n >= 16 else 32)
        yield ConvPlan(Variant.DIRECT, block_m, block_n, block_k=1, num_warps=MAX_WARPS, num_stages=1)
        return
    full_fp32 = operands.dtype == "float32" and operands.precision != "tf32"
    flat = K < _FLAT_CHANNELS and p.R * p.S > 1
    # Bytes are multiplied 32 at a time, and the steps of a loop are as long in bytes as those of halves.
    shortest, step = (32, 64) if operands.itemsize == 1 else (16, 32)
    narrow = not _whole_steps(K, shortest, step) or N % 8 != 0
    if full_fp32:
        tiles = _FLAT_FULL_FP32_TILES if flat else _FULL_FP32_TILES[1:] if narrow else _FULL_FP32_TILES
    elif flat:
        tiles = _FLAT_TILES
    else:
        tiles = _NARROW_TILES if narrow else _TILES
    rows, cols = power_of_two(M, 16), power_of_two(N, 16)
    if operands.dtype == "float8_e4m3fn" and device.multiplies_from_shared_memory:
        # Tiles of fewer rows are no wgmma's, and Triton converts their operands to halves in every step.
        tiles, rows = tuple(tile for tile in tiles if tile[0] >= 64), max(rows, 64)
    seen: set[tuple[int, int]] = set()
    for block_m, block_n in tiles:
        tile = block_m, min(block_n, cols)
        if tile in seen or block_m > rows:
            continue
        seen.add(tile)
        # Operands of wgmma, which takes 64 rows or more, stay in shared memory; otherwise a long step fills registers.
        half = operands.dtype != "float32" and not flat and device.multiplies_from_shared_memory
        long_step = half and block_m >= 64 and not narrow and _whole_steps(K, shortest, 2 * step)
        longest = 32 if flat else 2 * step if long_step else step
        block_k = 16 if full_fp32 else power_of_two(K * (p.R * p.S if flat else 1), shortest, longest)
        programs = cdiv(M, block_m) * cdiv(N, tile[1]) * p.groups * phases
        steps = p.R * p.S * cdiv(K, block_k)
        splittable = not flat and direction is Direction.FORWARD and _leaves_registers_to_split(tile, operands, device)
        for splits in _sum_splits(programs, steps, device) if splittable else (1,):
            yield ConvPlan(
                Variant.FLAT if flat else Variant.TAPS,
                *tile,
                block_k,
                num_warps=MAX_WARPS,
                num_stages=3,
                splits=splits,
            )
    block_m, block_n, stages = _WIDE_TILE
    if not flat and not narrow and operands.dtype != "float32" and block_m <= rows and block_n <= cols:
        block_k = power_of_two(K, shortest, step)
        yield ConvPlan(Variant.TAPS, block_m, block_n, block_k, 2 * MAX_WARPS, stages)


def _leaves_registers_to_split(tile: tuple[int, int], operands: Operands, device: DeviceSpec) -> bool:
    """Whether a tile leaves registers for scales and residual beside the addresses of partial sums.

    Found by compiling for sm_80: with 32 sums a thread some quantized launches spill.
    """
    return not operands.quantized or device.multiplies_from_shared_memory or tile[0] * tile[1] <= 64 * 32


def _sum_splits(programs: int, steps: int, device: DeviceSpec) -> tuple[int, ...]:
    """Candidate split counts where the tiles leave multiprocessors idle; each split keeps four steps at least."""
    return tuple(n for n in (1, 2, 4, 8, 16) if n == 1 or (programs * n <= 2 * device.sm_count and steps >= 4 * n))


def _weight_grad(p: ConvProblem, operands: Operands, device: DeviceSpec) -> Iterator[ConvPlan]:
    pixels, taps = p.N * p.P * p.Q, p.R * p.S
    if p.groups > 1 and min(p.group_outputs, p.group_inputs) < _DIRECT_CHANNELS:
        block_m = power_of_two(p.K, 1, 64)
        programs = cdiv(p.K, block_m) * taps * p.group_inputs
        block_k = power_of_two(pixels, 1, 32)
        splits = pixel_splits(pixels, block_k, programs, device)
        yield ConvPlan(Variant.DIRECT, block_m, 1, block_k, num_warps=MAX_WARPS, num_stages=1, splits=splits)
        return
    full_fp32 = operands.dtype == "float32" and operands.precision != "tf32"
    flat = p.group_inputs < _FLAT_CHANNELS and taps > 1
    columns = taps * p.group_inputs if flat else p.group_inputs
    # Both operands are read in runs of channels and one is transposed on the way: smaller tiles than the forward's.
    block_m = power_of_two(p.group_outputs, 16, 64)
    # With few rows, few threads compute the addresses of a flat sum: a long step, or a wide one, would spill.
    few_rows = flat and block_m == 16
    block_n = power_of_two(columns, 16, 16 if few_rows else 32 if flat or full_fp32 else 64)
    short_step = full_fp32 or few_rows
    block_k = power_of_two(pixels, 16, 16 if short_step else 32)
    programs = cdiv(p.group_outputs, block_m) * cdiv(columns, block_n) * (1 if flat else taps) * p.groups
    yield ConvPlan(
        Variant.FLAT if flat else Variant.TAPS,
        block_m,
        block_n,
        block_k,
        num_warps=MAX_WARPS,
        num_stages=3,
        splits=pixel_splits(pixels, block_k, programs, device),
    )


def grid(p: ConvProblem, direction: Direction, plan: ConvPlan) -> tuple[int, int, int]:
    """Return the grid of a launch: (tiles, groups, phases · splits)."""
    _, phases = tiled_pixels(p, direction)
    # Element by element, a tile spans groups.
    direct = plan.variant is Variant.DIRECT
    groups, spanned = (1, p.groups) if direct else (p.groups, 1)
    if direction is not Direction.WEIGHT_GRAD:
        gemm = gemm_mnk(p, direction)
        tiles = cdiv(gemm.M, plan.block_m) * cdiv(gemm.N * spanned, plan.block_n)
        return tiles, groups, phases * plan.splits
    taps = p.R * p.S
    if plan.variant is Variant.FLAT:
        columns = cdiv(taps * p.group_inputs, plan.block_n)
    else:
        columns = taps * cdiv(p.group_inputs, plan.block_n)
    return cdiv(p.group_outputs * spanned, plan.block_m) * columns, groups, plan.splits


def tiles(p: ConvProblem, direction: Direction, plan: ConvPlan) -> list[tuple[int, int]]:
    """Return (programs, steps of each along the sum) of each phase or split, as the kernels loop."""
    count, groups, _ = grid(p, direction, plan)
    return [(count * groups, steps) for steps in _steps(p, direction, plan)]


def _steps(p: ConvProblem, direction: Direction, plan: ConvPlan) -> list[int]:
    K = gemm_mnk(p, direction).K
    if direction is Direction.WEIGHT_GRAD:
        return [cdiv(share, plan.block_k) for share in shares(K, plan.splits)]
    taps = [p.R * p.S]
    if direction is Direction.INPUT_GRAD:
        # Every phase has as many tiles as the largest one, and tiles without a pixel still loop over their taps.
        taps = [r * s for (_, r), (_, s) in itertools.product(*map(phases, dimensions(p)))]
    if plan.variant is Variant.FLAT:
        return [cdiv(n * K, plan.block_k) for n in taps]
    steps = [n * cdiv(K, plan.block_k) for n in taps]
    return [share for n in steps for share in shares(n, plan.splits)]


def _whole_steps(K: int, shortest: int, longest: int) -> bool:
    """Whether steps of ``longest``, or of the next power of two, end where the channels do."""
    return K % power_of_two(K, shortest, longest) == 0


def _needs_measurement(plan: ConvPlan) -> bool:
    """Whether a plan is of the kind that was wrong on real GPUs: flattened loops over taps and channels at 8 warps,
    whatever the source (pytorch#173068)."""
    return plan.variant is not Variant.DIRECT and plan.num_warps > MAX_WARPS


def _takes_norm_grad(plan: ConvPlan, activation: str) -> bool:
    """Whether a thread has registers left beside the addresses, as found by compiling for sm_80 and sm_90.

    With 64 sums some spill; so do some beside gelu's derivative, the longest of all, some of 32 beside leaky_relu's,
    whose slope is one more, and some with joined taps.
    """
    if plan.variant is Variant.TAPS:
        return plan.sums_per_thread <= (16 if activation == "leaky_relu" else 32) and activation != "gelu"
    return plan.variant is Variant.DIRECT


FAMILY = Family(
    name="implicit_gemm",
    candidates=candidates,
    tiles=tiles,
    takes_norm_grad=_takes_norm_grad,
    main_loop_efficiency={Variant.TAPS: 0.745, Variant.FLAT: 0.163, Variant.DIRECT: 0.10},
    elementwise=frozenset((Variant.DIRECT,)),
    across_runs=frozenset((Variant.TAPS,)),
    can_pool=True,
    takes_quantized=True,
    any_tile=True,
    needs_measurement=_needs_measurement,
)
