"""Plans for matrix products through descriptors: supported 1×1 convolutions and tiles.

Tiles and stages are those whose machine code for sm_90 is clean with Triton 3.6 and 3.7: no spills with any epilogue,
operands multiplied out of shared memory while the next ones are on their way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from gpukern.conv.families.family import Family, few_sums
from gpukern.conv.families.float8_sums import least_runs, leaves_registers
from gpukern.conv.families.splits import grad_splits
from gpukern.conv.geometry import gemm_mnk
from gpukern.conv.plan import ConvPlan, Direction, Layout, Operands, Variant
from gpukern.conv.problem import ConvProblem
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.integers import cdiv, power_of_two, shares

#: block_m, block_n, warps, stages
Tile = tuple[int, int, int, int]

# On an H200, small tiles, several to a multiprocessor, are faster where there are few steps or much to write: the loads
# and stores of one are hidden by the products of the others. Long sums need many stages instead.
_TILES: tuple[Tile, ...] = (
    (256, 128, 8, 4),
    (128, 256, 8, 4),
    (128, 128, 8, 3),
    (128, 128, 8, 5),
    (128, 128, 4, 2),
    (128, 128, 4, 3),
    (256, 64, 4, 3),
    (128, 64, 4, 3),
    (128, 64, 4, 6),
    (64, 128, 4, 4),
    (64, 128, 4, 6),
    (64, 64, 4, 3),
    (64, 64, 4, 5),
    (32, 64, 4, 6),
    (16, 64, 4, 6),
)
# In float32 three stages of the largest tiles leave room for the output, four do not.
_TF32_TILES: tuple[Tile, ...] = ((256, 128, 8, 3), (128, 256, 8, 3), *_TILES[2:])
# Tensor cores take float32 only in runs along the sum; other operands are transposed on the way, through registers.
# So are those that are split into halves.
_THROUGH_REGISTERS: tuple[Tile, ...] = ((128, 128, 8, 3), (64, 64, 4, 4), (32, 64, 4, 4), (16, 64, 4, 4))
_GRAD_TILES: tuple[Tile, ...] = (
    (128, 256, 8, 3),
    (128, 128, 8, 3),
    (128, 128, 8, 5),
    (128, 64, 8, 4),
    (64, 128, 4, 6),
    (64, 128, 4, 8),
    (64, 64, 4, 6),
    (64, 64, 4, 8),
)
_GRAD_THROUGH_REGISTERS: tuple[Tile, ...] = ((128, 128, 8, 3), (64, 64, 4, 4))

# The fewest steps for which a tile that has a multiprocessor to itself is a candidate: only a second program hides the
# fetching and storing between two sums.
_LONG_SUM = 4

# Bytes that a program needs besides its buffers, for barriers.
_BESIDE_BUFFERS = 512


def candidates(p: ConvProblem, direction: Direction, operands: Operands, device: DeviceSpec) -> Iterator[ConvPlan]:
    planes = operands.first is Layout.NCHW
    if not device.copies_boxes or not _is_product(p, direction, operands):
        return
    if operands.dtype == "float32" and operands.precision == "ieee":
        return
    if direction is Direction.WEIGHT_GRAD:
        found = _weight_grad(p, operands, planes, device)
    else:
        found = _product(p, direction, operands, planes, device)
    for candidate in found:
        fits = _shared_memory(candidate, operands, direction) <= device.shared_memory
        if fits and leaves_registers(candidate, runs(p, direction, candidate, operands.dtype, device)):
            yield candidate


def _is_product(p: ConvProblem, direction: Direction, operands: Operands) -> bool:
    """Whether descriptors can describe all tensors as matrices whose rows are multiples of 16 bytes."""
    if (p.R, p.S, p.stride, p.padding, p.groups) != (1, 1, (1, 1), (0, 0, 0, 0), 1) or 0 in (p.N, p.C, p.H, p.W, p.K):
        return False
    if operands.quantized and not _takes_types(p, direction, operands):
        return False
    images = operands.first, operands.second if direction is Direction.WEIGHT_GRAD else operands.output
    filter = operands.output if direction is Direction.WEIGHT_GRAD else operands.second
    if direction is Direction.WEIGHT_GRAD:
        if filter is not Layout.NHWC or p.C * operands.itemsize % 16:
            return False
    elif filter not in (Layout.NHWC, Layout.TRANSPOSED):
        return False
    if images == (Layout.NCHW, Layout.NCHW):
        return p.H * p.W * operands.itemsize % 16 == 0
    return images == (Layout.NHWC, Layout.NHWC)


def _takes_types(p: ConvProblem, direction: Direction, operands: Operands) -> bool:
    """Whether the kernel has the dtypes of a quantized launch."""
    if operands.mixed or operands.dtype == "float32" or operands.first is Layout.NCHW:
        return False
    # A residual in 8 bits is read in rows of 16 bytes, whatever the output is.
    return gemm_mnk(p, direction).N % 16 == 0 and (operands.itemsize > 1 or _along_sum(direction, operands))


def _along_sum(direction: Direction, operands: Operands) -> bool:
    """Whether the filter's runs lie along the sum; the tensor cores take 8 bits from no other."""
    return (operands.second is Layout.NHWC) == (direction is Direction.FORWARD)


def _product(
    p: ConvProblem, direction: Direction, operands: Operands, planes: bool, device: DeviceSpec
) -> Iterator[ConvPlan]:
    gemm = gemm_mnk(p, direction)
    if operands.itemsize == 1:
        tiles, block_k = _TILES, min(power_of_two(gemm.K, 32), 128)
    elif operands.dtype != "float32":
        tiles, block_k = _TILES, 64
    elif operands.precision == "tf32x3" or planes or not _along_sum(direction, operands):
        tiles, block_k = _THROUGH_REGISTERS, 32
    else:
        tiles, block_k = _TF32_TILES, 32
    pixels = p.H * p.W if planes else p.N * p.H * p.W
    steps = cdiv(gemm.K, block_k)
    for block_m, block_n, warps, stages in tiles:
        if block_m > power_of_two(pixels, 16) or block_n > power_of_two(gemm.N, 64):
            continue
        if (block_m, warps) == (256, 4) and device.compute_capability >= (10, 0):
            continue  # with statistics it spills there
        whole = ConvPlan(
            Variant.GEMM,
            block_m,
            block_n,
            block_k,
            warps,
            # More buffers than steps would only lower the occupancy.
            min(stages, max(steps, 2)),
            box=(1, 1, block_m) if planes else None,
        )
        if persistent(whole) and steps < _LONG_SUM:
            continue
        programs = tile_count(p, direction, whole)
        for splits in _sum_splits(programs, steps, device) if parts(whole) == 1 else (1,):
            yield replace(whole, splits=splits)


def _sum_splits(programs: int, steps: int, device: DeviceSpec) -> Iterator[int]:
    """Candidate split counts where tiles leave multiprocessors idle; each split keeps four steps at least."""
    yield 1
    most = min(2 * device.sm_count // programs, steps // 4, 16)
    for splits in (2, 4, 8, 16):
        if most // 4 < splits <= most:
            yield splits


def _weight_grad(p: ConvProblem, operands: Operands, planes: bool, device: DeviceSpec) -> Iterator[ConvPlan]:
    half = operands.dtype != "float32"
    # The sum goes along the pixels, as do the runs of NCHW images.
    along_sum = planes and operands.precision != "tf32x3"
    block_k = 64 if half else 32
    for block_m, block_n, warps, stages in _GRAD_TILES if half or along_sum else _GRAD_THROUGH_REGISTERS:
        if block_m > power_of_two(p.K, 64) or block_n > power_of_two(p.C, 64):
            continue
        box = (1, 1, block_k) if planes else None
        whole = ConvPlan(Variant.GEMM, block_m, block_n, block_k, warps, stages, box=box)
        programs = tile_count(p, Direction.WEIGHT_GRAD, whole)
        for splits in grad_splits(programs, _steps(p, Direction.WEIGHT_GRAD, whole), device):
            yield replace(whole, splits=splits)


def tiles(p: ConvProblem, direction: Direction, plan: ConvPlan) -> list[tuple[int, int]]:
    """Return (programs, steps of each along the sum) of every split."""
    count = tile_count(p, direction, plan)
    return [(count, steps) for steps in shares(_steps(p, direction, plan), plan.splits)]


def tile_count(p: ConvProblem, direction: Direction, plan: ConvPlan) -> int:
    if direction is Direction.WEIGHT_GRAD:
        return cdiv(p.K, plan.block_m) * cdiv(p.C, plan.block_n)
    return row_tiles(p, plan) * cdiv(gemm_mnk(p, direction).N, plan.block_n)


def row_tiles(p: ConvProblem, plan: ConvPlan) -> int:
    """Return the number of tiles along the pixels."""
    images, pixels = matrices(p, plan)
    return images * cdiv(pixels, plan.block_m)


def matrices(p: ConvProblem, plan: ConvPlan) -> tuple[int, int]:
    """Return (matrices, pixels of each): a plan with a box of one image is for NCHW, where every image is a matrix."""
    return (p.N, p.H * p.W) if plan.box else (1, p.N * p.H * p.W)


def parts(plan: ConvPlan) -> int:
    """Return the number of parts of a tile's epilogue: with 128 sums a thread, halves leave it enough registers."""
    return 2 if plan.block_m * plan.block_n >= 128 * 32 * plan.num_warps else 1


def persistent(plan: ConvPlan) -> bool:
    """Whether programs take tile after tile. With smaller tiles two programs fit a multiprocessor and hide as much."""
    return plan.splits == 1 and plan.block_m * plan.block_n >= 256 * 128


def _steps(p: ConvProblem, direction: Direction, plan: ConvPlan) -> int:
    if direction is Direction.WEIGHT_GRAD:
        images, pixels = matrices(p, plan)
        return images * cdiv(pixels, plan.block_k)
    return cdiv(gemm_mnk(p, direction).K, plan.block_k)


def runs(p: ConvProblem, direction: Direction, plan: ConvPlan, dtype: str, device: DeviceSpec) -> int:
    """Return the runs of every split of a sum of products of ``dtype``: see ``float8_sums.py``."""
    return least_runs(cdiv(_steps(p, direction, plan), plan.splits), plan.block_k, dtype, device)


def _shared_memory(plan: ConvPlan, operands: Operands, direction: Direction) -> int:
    """Bytes of the buffers for operands and for the outgoing result; those of a lone tile share their memory."""
    buffers = plan.num_stages * (plan.block_m + plan.block_n) * plan.block_k * operands.itemsize
    if direction is Direction.WEIGHT_GRAD:
        return max(buffers, plan.block_m * plan.block_n * 4) + _BESIDE_BUFFERS
    result = plan.block_m * plan.block_n * operands.itemsizes[2] // parts(plan)
    return (buffers + result if persistent(plan) else max(buffers, result)) + _BESIDE_BUFFERS


FAMILY = Family(
    name="tma_gemm",
    candidates=candidates,
    tiles=tiles,
    takes_norm_grad=few_sums,
    main_loop_efficiency={Variant.GEMM: 1.0},
    takes_quantized=True,
    uses_descriptors=True,
)
