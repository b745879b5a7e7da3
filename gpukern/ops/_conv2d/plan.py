"""Which launch a convolution gets: a pure function of the problem and the device, without torch or Triton."""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass

from gpukern.ops._conv2d.problem import ConvProblem
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.integers import cdiv, power_of_two


class Direction(enum.Enum):
    FORWARD = "forward"
    INPUT_GRAD = "input gradient"
    WEIGHT_GRAD = "weight gradient"


class Variant(str, enum.Enum):
    """How a kernel walks its sum; the values are the kernels' ``VARIANT``."""

    TAPS = "taps"
    FLAT = "flat"
    DIRECT = "direct"


@dataclass(frozen=True)
class ConvPlan:
    """Tile M × N with steps of K along the sum; ``splits`` programs share one sum (weight gradient only)."""

    variant: Variant
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    splits: int = 1


# Flattened loops over taps and channels gave wrong results at 8 warps on real GPUs (pytorch#173068): 4 is the cap until
# a GPU has shown each configuration right.
MAX_WARPS = 4

# Below this many channels a group, tensor-core tiles (16 at least) are mostly padding: multiply element by element.
_DIRECT_CHANNELS = 8
# Below this many channels one step of 16 or more along the sum would be mostly padding: join the taps to the channels.
_FLAT_CHANNELS = 16

# Tiles M × N, the largest first. Addresses of a flat sum and fp32 operands in full precision fill the registers, and
# before Hopper so do the operands: larger tiles than these spill.
_TILES = ((128, 64), (64, 64), (64, 32), (32, 32), (16, 32))
_HOPPER_TILES = ((128, 128), *_TILES)
_FLAT_TILES = ((64, 32), (32, 32), (16, 32))
_FULL_FP32_TILES = ((64, 32), (16, 32))
_FLAT_FULL_FP32_TILES = ((32, 32), (16, 32))


@functools.lru_cache(maxsize=4096)
def plan(problem: ConvProblem, direction: Direction, dtype: str, precision: str, device: DeviceSpec) -> ConvPlan:
    """The launch for ``problem``; ``dtype`` is "float32", "float16" or "bfloat16", ``precision`` "tf32" or "ieee"."""
    full_fp32 = dtype == "float32" and precision == "ieee"
    if direction is Direction.WEIGHT_GRAD:
        return _plan_weight_grad(problem, dtype, full_fp32, device)
    return _plan_gather(problem, direction, dtype, full_fp32, device)


def _plan_gather(p: ConvProblem, direction: Direction, dtype: str, full_fp32: bool, device: DeviceSpec) -> ConvPlan:
    pixels, phases = tiled_pixels(p, direction)
    columns, reduction = p.group_outputs, p.group_inputs
    if direction is Direction.INPUT_GRAD:
        columns, reduction = reduction, columns
    if p.groups > 1 and min(columns, reduction) < _DIRECT_CHANNELS:
        block_n = power_of_two(columns * p.groups, 1, 64)
        return ConvPlan(
            Variant.DIRECT,
            # 16 elements a thread, if the columns fill a tile. Found by compiling: of 4 and of 8, some spill.
            block_m=power_of_two(pixels, 1, 2048 // block_n if block_n >= 16 else 32),
            block_n=block_n,
            block_k=1,
            num_warps=MAX_WARPS,
            num_stages=1,
        )
    flat = reduction < _FLAT_CHANNELS and p.R * p.S > 1
    if full_fp32:
        tiles = _FLAT_FULL_FP32_TILES if flat else _FULL_FP32_TILES
    else:
        tiles = _FLAT_TILES if flat else _HOPPER_TILES if _has_wgmma(device) else _TILES
    block_m, block_n = _tile(pixels, columns, p.groups * phases, tiles, device)
    # Operands of wgmma, which takes 64 rows or more, stay in shared memory; otherwise a long step fills the registers.
    long_step = _has_wgmma(device) and block_m >= 64 and dtype != "float32" and not flat
    return ConvPlan(
        Variant.FLAT if flat else Variant.TAPS,
        block_m,
        block_n,
        16 if full_fp32 else power_of_two(reduction * (p.R * p.S if flat else 1), 16, 64 if long_step else 32),
        num_warps=MAX_WARPS,
        num_stages=3,
    )


def _plan_weight_grad(p: ConvProblem, dtype: str, full_fp32: bool, device: DeviceSpec) -> ConvPlan:
    pixels, taps = p.N * p.P * p.Q, p.R * p.S
    if p.groups > 1 and min(p.group_outputs, p.group_inputs) < _DIRECT_CHANNELS:
        block_m = power_of_two(p.K, 1, 64)
        programs = cdiv(p.K, block_m) * taps * p.group_inputs
        block_k = power_of_two(pixels, 1, 32)
        splits = _splits(pixels, block_k, programs, device)
        return ConvPlan(Variant.DIRECT, block_m, 1, block_k, num_warps=MAX_WARPS, num_stages=1, splits=splits)
    flat = p.group_inputs < _FLAT_CHANNELS and taps > 1
    columns = taps * p.group_inputs if flat else p.group_inputs
    # Both operands are read in runs of channels and one is transposed on the way: smaller tiles than the forward's.
    block_m = power_of_two(p.group_outputs, 16, 64)
    block_n = power_of_two(columns, 16, 32 if flat or full_fp32 else 64)
    # The addresses of a flat sum are worked out by few threads where there are few rows: a long step would spill.
    short_step = full_fp32 or (flat and block_m == 16)
    block_k = power_of_two(pixels, 16, 16 if short_step else 32)
    programs = cdiv(p.group_outputs, block_m) * cdiv(columns, block_n) * (1 if flat else taps) * p.groups
    return ConvPlan(
        Variant.FLAT if flat else Variant.TAPS,
        block_m,
        block_n,
        block_k,
        num_warps=MAX_WARPS,
        num_stages=3,
        splits=_splits(pixels, block_k, programs, device),
    )


def tiled_pixels(p: ConvProblem, direction: Direction) -> tuple[int, int]:
    """(pixels, phases): what rows of tiles, or the sum of the weight gradient, count through, and how many times.

    Those of y; for the input gradient those of dx in the largest of the stride's phases.
    """
    if direction is Direction.INPUT_GRAD:
        return p.N * cdiv(p.H, p.stride[0]) * cdiv(p.W, p.stride[1]), p.stride[0] * p.stride[1]
    return p.N * p.P * p.Q, 1


def grid(p: ConvProblem, direction: Direction, choice: ConvPlan) -> tuple[int, int, int]:
    """The programs of a launch: (tiles, groups, phases), of the weight gradient (tiles, groups, splits)."""
    pixels, phases = tiled_pixels(p, direction)
    # Element by element, a tile spans groups.
    direct = choice.variant is Variant.DIRECT
    groups, spanned = (1, p.groups) if direct else (p.groups, 1)
    if direction is not Direction.WEIGHT_GRAD:
        columns = p.group_outputs if direction is Direction.FORWARD else p.group_inputs
        return cdiv(pixels, choice.block_m) * cdiv(columns * spanned, choice.block_n), groups, phases
    taps = p.R * p.S
    if choice.variant is Variant.FLAT:
        columns = cdiv(taps * p.group_inputs, choice.block_n)
    else:
        columns = taps * cdiv(p.group_inputs, choice.block_n)
    return cdiv(p.group_outputs * spanned, choice.block_m) * columns, groups, choice.splits


def _tile(
    pixels: int, columns: int, copies: int, tiles: tuple[tuple[int, int], ...], device: DeviceSpec
) -> tuple[int, int]:
    """The largest of ``tiles`` of which there is one for each multiprocessor, else the smallest.

    No tile of more rows than the problem, or columns, to the next power of two.
    """
    rows, cols = power_of_two(pixels), power_of_two(columns, 16)
    for block_m, block_n in tiles:
        block_n = min(block_n, cols)
        if block_m <= rows and cdiv(pixels, block_m) * cdiv(columns, block_n) * copies >= device.sm_count:
            break
    return block_m, block_n


def _has_wgmma(device: DeviceSpec) -> bool:
    """Hopper multiplies straight from shared memory; before it, operands pass through the registers."""
    return device.compute_capability >= (9, 0)


def _splits(pixels: int, block_k: int, programs: int, device: DeviceSpec) -> int:
    """Enough splits for two waves, of at least four steps along the sum each; partial sums cost memory traffic."""
    wanted = cdiv(2 * device.sm_count, max(programs, 1))
    return max(1, min(wanted, cdiv(pixels, 4 * block_k), 64))


def channel_sum_splits(pixels: int, channels: int, device: DeviceSpec) -> int:
    """Splits of the bias gradient, whose programs take 64 channels each."""
    return _splits(pixels, 64, cdiv(channels, 64), device)
