"""Plans for weight gradients over boxes of one pixel of many images: supported problems and tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from gpukern.conv.families.family import Family
from gpukern.conv.families.splits import grad_splits
from gpukern.conv.geometry import Dimension, dimensions
from gpukern.conv.plan import ConvPlan, Direction, Layout, Operands, Variant
from gpukern.conv.problem import ConvProblem
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.integers import cdiv, power_of_two, shares

#: K channels, (taps ·) C channels, warps, stages. Each compiles for sm_90 without a spill, with Triton 3.6 and 3.7, and
#: multiplies out of shared memory.
Tile = tuple[int, int, int, int]

_TILES: tuple[Tile, ...] = (
    (128, 256, 8, 3),
    (128, 128, 8, 3),
    (128, 128, 8, 6),
    (128, 64, 8, 4),
    (64, 128, 4, 4),
    (64, 128, 4, 7),
    (64, 64, 4, 4),
    (64, 64, 4, 7),
)
# Three neighbouring taps use the same box of dy: fetching it once halves the total traffic.
_THREE_TAPS: tuple[Tile, ...] = ((128, 3 * 128, 8, 3), (128, 3 * 64, 8, 4), (64, 3 * 64, 4, 3), (64, 3 * 64, 4, 4))
# Tensor cores take float32 only in runs along the sum, here the images: the registers transpose it.
_FLOAT32_TILES: tuple[Tile, ...] = ((128, 128, 8, 3), (64, 64, 4, 4))
# Fewer images would fill too little of a box.
_FEWEST_IMAGES = 32


def candidates(p: ConvProblem, direction: Direction, operands: Operands, device: DeviceSpec) -> Iterator[ConvPlan]:
    if direction is not Direction.WEIGHT_GRAD or not device.copies_boxes or not _serves(p, operands):
        return
    half = operands.dtype != "float32"
    # The longest step that wastes no products: 96 images are three boxes of 32.
    block_k = 64 if half and cdiv(p.N, 32) % 2 == 0 else 32
    offered = _FLOAT32_TILES if not half else (*_THREE_TAPS, (128, 128, 8, 3)) if p.S % 3 == 0 else _TILES
    for block_m, block_n, warps, stages in offered:
        whole = ConvPlan(Variant.BATCH_BOX, block_m, block_n, block_k, warps, stages)
        channels = block_n // together(whole)
        if block_m > power_of_two(p.K, 64) or channels > power_of_two(p.C, 64):
            continue
        buffers = max(stages * (block_m + block_n) * block_k * operands.itemsize, block_m * channels * 4)
        if buffers >= device.shared_memory:
            continue
        for splits in grad_splits(tile_count(p, whole), max(_steps(p, whole)), device):
            yield replace(whole, splits=splits)


def _serves(p: ConvProblem, operands: Operands) -> bool:
    if not (operands.first.has_runs and operands.second.has_runs and operands.output is Layout.NHWC):
        return False
    if operands.dtype == "float32" and operands.precision == "ieee":
        return False
    if p.groups != 1 or p.N < _FEWEST_IMAGES or 0 in (p.C, p.H, p.W, p.K):
        return False
    return p.C * operands.itemsize % 16 == 0


def tiles(p: ConvProblem, direction: Direction, plan: ConvPlan) -> list[tuple[int, int]]:
    """Return (programs, steps of each along the sum) of every group of taps and split."""
    steps = _steps(p, plan)
    count = tile_count(p, plan) // len(steps)
    return [(count, share) for total in steps for share in shares(total, plan.splits)]


def tile_count(p: ConvProblem, plan: ConvPlan) -> int:
    taps = together(plan)
    return p.R * p.S // taps * cdiv(p.K, plan.block_m) * cdiv(p.C, plan.block_n // taps)


def together(plan: ConvPlan) -> int:
    """Return the number of neighbouring taps in a tile, whose columns are each tap's in turn.

    Without them the number of columns is a power of two, so a factor of 3 shows them.
    """
    return 3 if plan.block_n % 3 == 0 else 1


def _steps(p: ConvProblem, plan: ConvPlan) -> list[int]:
    """Return the steps of each tap group: pixels of dy with a tap in the image, in boxes of ``block_k`` images."""
    vertical, horizontal = dimensions(p)
    taps = together(plan)
    rows = [_inside(vertical, r, r) for r in range(p.R)]
    cols = [_inside(horizontal, s, s + taps - 1) for s in range(0, p.S, taps)]
    return [r * c * cdiv(p.N, plan.block_k) for r in rows for c in cols]


def _inside(d: Dimension, first_tap: int, last_tap: int) -> int:
    """Count output rows from the first to the last with a tap in the image; see ``inside_range`` in ``kernels.py``."""
    first = max(cdiv(d.before - last_tap * d.dilation, d.stride), 0)
    end = min((d.inputs - 1 + d.before - first_tap * d.dilation) // d.stride + 1, d.outputs)
    return max(end - first, 0)


FAMILY = Family(
    name="tma_wgrad",
    candidates=candidates,
    tiles=tiles,
    main_loop_efficiency={Variant.BATCH_BOX: 0.76},
    uses_descriptors=True,
)
