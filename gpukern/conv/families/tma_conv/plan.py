"""Plans for convolution over boxes of pixels: supported problems and tiles."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace

from gpukern.conv.families.family import Family, few_sums
from gpukern.conv.families.float8_sums import even_runs, leaves_registers
from gpukern.conv.geometry import dimensions, gemm_mnk, phases
from gpukern.conv.plan import ConvPlan, Direction, Operands, Variant
from gpukern.conv.problem import ConvProblem
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.integers import cdiv, power_of_two, shares

#: Images, rows, columns.
Box = tuple[int, int, int]

# Pixels, channels, warps, stages of 128 bytes along the sum. Up to 128 pixels leave room for two programs on a
# multiprocessor. Each compiles for sm_90 without a spill, with Triton 3.6 and 3.7, and multiplies out of shared memory.
_TILES = (
    (256, 128, 8, 3),
    (256, 64, 4, 4),
    (128, 128, 8, 3),
    (128, 128, 8, 5),
    (128, 128, 4, 3),
    (128, 64, 4, 3),
    (128, 64, 4, 4),
    (64, 128, 4, 3),
    (64, 128, 4, 4),
    (64, 128, 4, 6),
    (64, 64, 4, 4),
)
# The tensor cores take float32 only in runs along the sum: for ∂L/∂x the registers transpose the filter on its way.
_TRANSPOSING_TILES = ((256, 128, 8, 3), (256, 64, 4, 4), (128, 128, 8, 3), (128, 64, 4, 4), (64, 64, 4, 4))
# Operands that are split into halves pass through the registers too.
_FULL_FP32_TILES = ((128, 128, 8, 3), (64, 64, 4, 4))
# The longest step along the sum, in bytes, that TMA stores without bank conflicts.
_STEP_BYTES = 128
_MOST_STAGES = 6
# A tile of more pixels is finished in two parts, one after the other (see PART_N in ``kernels.py``), and not split: the
# addresses of its partial sums would spill.
_LARGEST_PART = 128
# Sums that a thread scales and rounds at once: with 128, gelu spills on sm_90.
_MOST_SCALED_SUMS = 64
_BOX_SIDE = 256
# Bytes of barriers besides the buffers.
_SHARED_MEMORY_BESIDE = 1024


def candidates(p: ConvProblem, direction: Direction, operands: Operands, device: DeviceSpec) -> Iterator[ConvPlan]:
    if not device.copies_boxes or not _serves(p, direction, operands):
        return
    images, rows, cols = output_sizes(p, direction)
    N = gemm_mnk(p, direction).N
    block_k = _step(p, direction, operands.itemsize)
    if not block_k:
        return
    sums = _steps(p, direction, block_k)
    for block_m, block_n, warps, stages in _tiles(direction, operands):
        too_large = block_m > power_of_two(images * rows * cols, 64) or block_n > power_of_two(N, 64)
        if too_large or (writes_halves(p, direction) and N % block_n):
            continue
        stages = min(stages * _STEP_BYTES // (block_k * operands.itemsize), _MOST_STAGES)
        shared_memory = stages * (block_m + block_n) * block_k * operands.itemsize + _SHARED_MEMORY_BESIDE
        if shared_memory > device.shared_memory:
            continue
        box = tile_box(p, direction, block_m)
        if p.pool and part(box)[1] % 2:
            continue
        plan = ConvPlan(Variant.BOX, block_m, block_n, block_k, warps, stages, box=box)
        if operands.quantized and part(box) == box and plan.sums_per_thread > _MOST_SCALED_SUMS:
            continue
        programs = tile_count(p, direction, plan) * len(sums)
        for splits in (1, *_splits(plan, programs, max(sums), device)):
            # There are no more stages than steps.
            whole = replace(plan, splits=splits, num_stages=min(stages, cdiv(max(sums), splits)))
            of_sum = runs(p, direction, whole, operands.dtype, device)
            if leaves_registers(whole, of_sum) and (of_sum == 1 or splits == 1):
                yield whole


def runs(p: ConvProblem, direction: Direction, plan: ConvPlan, dtype: str, device: DeviceSpec) -> int:
    """Return the runs of every split of a sum of products of ``dtype``: see ``float8_sums.py``."""
    steps = cdiv(max(_steps(p, direction, plan.block_k)), plan.splits)
    return even_runs(steps, plan.block_k, dtype, device)


def tiles(p: ConvProblem, direction: Direction, plan: ConvPlan) -> list[tuple[int, int]]:
    """Return (programs, steps of each along the sum) of each phase and split."""
    count = tile_count(p, direction, plan)
    return [(count, share) for steps in _steps(p, direction, plan.block_k) for share in shares(steps, plan.splits)]


def tile_count(p: ConvProblem, direction: Direction, plan: ConvPlan) -> int:
    """Return the number of tiles of one phase."""
    return box_count(p, direction, plan.own_box) * cdiv(gemm_mnk(p, direction).N, plan.block_n)


def box_count(p: ConvProblem, direction: Direction, box: Box) -> int:
    """Return the number of boxes that cover the pixels of one phase."""
    images, rows, cols = map(cdiv, output_sizes(p, direction), box)
    return images * rows * cols


def part(box: Box) -> Box:
    """Return the half of a large box that the epilogue takes at once: along its first dimension longer than one."""
    images, rows, cols = box
    if images * rows * cols <= _LARGEST_PART:
        return box
    if images > 1:
        return images // 2, rows, cols
    return (1, rows // 2, cols) if rows > 1 else (1, 1, cols // 2)


def output_sizes(p: ConvProblem, direction: Direction) -> Box:
    """Return the images, rows and columns that tiles enumerate: of y, or of one phase of ∂L/∂x."""
    if direction is Direction.FORWARD:
        return p.N, p.P, p.Q
    return p.N, p.H // p.stride[0], p.W // p.stride[1]


def reads_every_other(p: ConvProblem, direction: Direction) -> bool:
    """Whether every tap reads even rows and columns only: those are an image of their own, read with a stride of 1."""
    even = p.padding[0] % 2 == p.padding[2] % 2 == 0
    return direction is Direction.FORWARD and p.stride == (2, 2) and p.R == p.S == 1 and even


def reads_halves(p: ConvProblem, direction: Direction) -> bool:
    """Whether x is read in halves of its rows and columns, by parity."""
    return direction is Direction.FORWARD and p.stride == (2, 2) and not reads_every_other(p, direction)


def writes_halves(p: ConvProblem, direction: Direction) -> bool:
    """Whether ∂L/∂x is written in halves of its rows and columns, by parity."""
    return direction is Direction.INPUT_GRAD and p.stride == (2, 2)


def tile_box(p: ConvProblem, direction: Direction, pixels: int) -> Box:
    """Return a tile's box of so many pixels: whole windows of 2 × 2 where these are pooled."""
    images, rows, cols = output_sizes(p, direction)
    if not p.pool:
        return best_box(pixels, images, rows, cols)
    images, rows, cols = best_box(pixels // 4, images, rows // 2, cols // 2)
    return images, 2 * rows, 2 * cols


def stored(p: ConvProblem, box: Box) -> Box:
    """Return the part of a box of pixels that is written."""
    images, rows, cols = box
    return (images, rows // 2, cols // 2) if p.pool else box


@functools.lru_cache(maxsize=4096)
def best_box(pixels: int, *sizes: int) -> Box:
    """Return the box of so many pixels that covers images × rows × columns with the fewest beyond them.

    Ties go to the fewest images, then to the box closest to a square, whose reads overlap least with its neighbours'.
    """
    powers = [1 << i for i in range(pixels.bit_length()) if 1 << i <= _BOX_SIDE]
    boxes = ((pixels // (h * w), h, w) for h, w in itertools.product(powers, powers) if h * w <= pixels)

    def preference(box: Box) -> tuple[int, ...]:
        images, rows, cols = (cdiv(size, side) * side for size, side in zip(sizes, box, strict=True))
        return images * rows * cols, box[0], box[1] + box[2], box[1]

    return min((box for box in boxes if box[0] <= _BOX_SIDE), key=preference)


def _serves(p: ConvProblem, direction: Direction, operands: Operands) -> bool:
    if direction is Direction.WEIGHT_GRAD or p.groups != 1 or min(p.N, p.C, p.K, p.H, p.W) < 1:
        return False
    if operands.dtype == "float32" and operands.precision == "ieee":
        return False
    if operands.quantized and not takes_types(p, direction, operands):
        return False
    # Without neighbouring taps and without a stride it is a matrix product.
    if p.stride == (1, 1) and p.R * p.S == 1:
        return False
    by_parity = reads_halves(p, direction) or writes_halves(p, direction)
    if p.stride not in ((1, 1), (2, 2)) or (by_parity and (p.H % 2 or p.W % 2)):
        return False
    return operands.first.has_runs and operands.second.has_runs and operands.output.has_runs


def takes_types(p: ConvProblem, direction: Direction, operands: Operands) -> bool:
    """Whether the kernel has the dtypes of a quantized launch."""
    if operands.mixed or operands.dtype == "float32" or gemm_mnk(p, direction).N % 16:
        return False  # a residual in 8 bits is read in rows of 16 bytes, whatever the output is
    # The tensor cores take 8 bits from runs along the sum only.
    return operands.itemsize > 1 or direction is Direction.FORWARD


def _tiles(direction: Direction, operands: Operands) -> tuple[tuple[int, int, int, int], ...]:
    if operands.precision == "tf32x3":
        return _FULL_FP32_TILES
    return _TRANSPOSING_TILES if operands.dtype == "float32" and direction is Direction.INPUT_GRAD else _TILES


def _step(p: ConvProblem, direction: Direction, itemsize: int) -> int:
    """Return the step along the sum, 0 if none fits."""
    least = 32 if itemsize == 1 else 16  # of products of 8 bits an instruction takes 32
    step = _longest_step(p, direction, _STEP_BYTES // itemsize, least)
    if step > least and max(_steps(p, direction, step)) == 1:
        # With two steps, one is fetched while the other is multiplied.
        step //= 2
    # For a single step, Triton generates products that ptxas has to rework.
    return step if step and max(_steps(p, direction, step)) > 1 else 0


def _longest_step(p: ConvProblem, direction: Direction, longest: int, least: int) -> int:
    K = gemm_mnk(p, direction).K
    if reads_halves(p, direction):
        # The next channels in memory are those of the other parity's pixels, so that a step must end where they do.
        return next((step for step in (128, 64, 32, 16) if least <= step <= longest and K % step == 0), 0)
    if longest > K:
        return power_of_two(K, least)
    half = longest // 2
    # A shorter step if that saves an eighth of the sum.
    saves = 8 * cdiv(K, half) * half <= 7 * cdiv(K, longest) * longest
    return half if saves else longest


def _splits(plan: ConvPlan, programs: int, steps: int, device: DeviceSpec) -> list[int]:
    """Return the two largest split counts that leave each program a multiprocessor and at least four steps, if any."""
    if plan.block_m > _LARGEST_PART:
        return []
    return [n for n in (2, 4, 8, 16) if n * programs <= device.sm_count and steps >= 4 * n][-2:]


def _steps(p: ConvProblem, direction: Direction, block_k: int) -> list[int]:
    """Return the steps along the sum of each phase, over all splits."""
    taps = [p.R * p.S]
    if direction is Direction.INPUT_GRAD:
        taps = [r * s for (_, r), (_, s) in itertools.product(*map(phases, dimensions(p)))]
    return [n * cdiv(gemm_mnk(p, direction).K, block_k) for n in taps]


FAMILY = Family(
    name="tma_conv",
    candidates=candidates,
    tiles=tiles,
    takes_norm_grad=few_sums,
    main_loop_efficiency={Variant.BOX: 0.95},
    takes_quantized=True,
    can_pool=True,
    uses_descriptors=True,
)
