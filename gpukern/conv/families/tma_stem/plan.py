"""Plans for the convolution of few channels by whole filter rows: supported problems, and the packing of x."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from gpukern.conv.families.family import Family
from gpukern.conv.families.tma_conv.plan import takes_types, tile_box, tile_count
from gpukern.conv.plan import ConvPlan, Direction, Operands, Variant
from gpukern.conv.problem import ConvProblem
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.integers import cdiv, power_of_two

#: Pixels, channels, warps. Each compiles for sm_90 and sm_100 without a spill, with Triton 3.6 and 3.7 ...
_TILES = ((256, 64, 8), (128, 128, 8), (128, 64, 4))
#: ... except the smallest, which spills on sm_100 with statistics.
_HOPPER_TILES = (*_TILES, (64, 64, 4))
#: Operands that are split into halves pass through the registers.
_FULL_FP32_TILES = ((64, 64, 4),)
_MOST_STAGES = 4
#: Images with more channels go to the kernels that read x as it is.
_MOST_CHANNELS = 8
_LONGEST_WINDOW = 256  # bytes


class Packed(NamedTuple):
    """Sizes of the padded image, such that TMA can load windows of it."""

    images: int
    rows: int
    cols: int
    channels: int

    @property
    def elements(self) -> int:
        return math.prod(self)


def candidates(p: ConvProblem, direction: Direction, operands: Operands, device: DeviceSpec) -> Iterator[ConvPlan]:
    if not device.copies_boxes or not _serves(p, direction, operands):
        return
    block_k = power_of_two(window(p, operands.itemsize), 16)
    if block_k * operands.itemsize > _LONGEST_WINDOW:
        return
    stages = min(p.R, _MOST_STAGES)
    shapes = _HOPPER_TILES if device.compute_capability < (10, 0) else _TILES
    for block_m, block_n, warps in _FULL_FP32_TILES if operands.precision == "tf32x3" else shapes:
        too_large = block_m > power_of_two(p.N * p.P * p.Q, 64) or block_n > power_of_two(p.K, 64)
        if too_large or stages * (block_m + block_n) * block_k * operands.itemsize > device.shared_memory // 2:
            continue
        box = tile_box(p, direction, block_m)
        yield ConvPlan(Variant.STEM, block_m, block_n, block_k, warps, stages, box=box)


def tiles(p: ConvProblem, direction: Direction, plan: ConvPlan) -> list[tuple[int, int]]:
    return [(tile_count(p, direction, plan), p.R)]


def packed(p: ConvProblem, itemsize: int) -> Packed:
    """Return the sizes of the image that the pass before the convolution writes."""
    # A window's neighbours lie stride · channels and cols · channels elements further: multiples of 16 bytes. And each
    # stride of the windows is a multiple of the one before, as in TMA's documentation; but they overlap.
    vertical, horizontal = p.stride
    channels = _round_up(p.C, 16 // math.gcd(16, horizontal * itemsize))
    rows = _round_up((p.P - 1) * vertical + p.R, vertical)
    cols = _round_up((p.Q - 1) * horizontal + p.S, math.lcm(horizontal, 16 // math.gcd(16, channels * itemsize)))
    return Packed(p.N, rows, cols, channels)


def window(p: ConvProblem, itemsize: int) -> int:
    """Return the number of elements that one filter row reads."""
    return p.S * packed(p, itemsize).channels


def _serves(p: ConvProblem, direction: Direction, operands: Operands) -> bool:
    if direction is not Direction.FORWARD or p.groups != 1 or p.dilation != (1, 1):
        return False
    # With a single step there is no loop, and ptxas then passes operands through registers.
    if p.R == 1 or not 1 <= p.C <= _MOST_CHANNELS or min(p.N, p.K) < 1 or not operands.output.has_runs:
        return False
    if operands.quantized and (operands.itemsize == 1 or not takes_types(p, direction, operands)):
        return False
    return operands.dtype != "float32" or operands.precision != "ieee"


def _round_up(value: int, step: int) -> int:
    return cdiv(value, step) * step


def _packing(p: ConvProblem, itemsize: int) -> tuple[int, int]:
    """Return the packing pass: (launches, bytes) to write the packed image and read it again."""
    return 1, 2 * packed(p, itemsize).elements * itemsize


FAMILY = Family(
    name="tma_stem",
    candidates=candidates,
    tiles=tiles,
    main_loop_efficiency={Variant.STEM: 0.9},
    takes_quantized=True,
    can_pool=True,
    uses_descriptors=True,
    fetches_short_rows=True,
    extra_passes=_packing,
)
