"""Plans for grouped convolution by block-diagonal products: supported problems and tiles."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from gpukern.conv.families.family import Family
from gpukern.conv.geometry import dimensions, gemm_mnk, phases, tiled_pixels
from gpukern.conv.plan import ConvPlan, Direction, Layout, Operands, Variant
from gpukern.conv.problem import ConvProblem
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.integers import cdiv, power_of_two

# Channels of a tile, made or summed over, at least: those of a matrix instruction, and a run of 32 bytes or more.
_CHANNELS = 32
_SMALLEST = 16
# From this many channels on, a group fills tiles of its own.
_FULL_GROUP = 32
# Pixels of a tile. The registers cannot hold the addresses of more, nor of more than 64 in fp32 or with channel pairs.
_TILES = (128, 64)
_STAGES = 4
# A bit mask records which taps of a pixel lie inside the image.
_MOST_TAPS = 32
_RUNS = (Layout.NHWC, Layout.NHWC_STRIDED)


def candidates(p: ConvProblem, direction: Direction, operands: Operands, device: DeviceSpec) -> Iterator[ConvPlan]:
    if not _serves(p, direction, operands):
        return
    block_n, block_k = _blocks(p, direction)
    gemm = gemm_mnk(p, direction)
    pairs = 2 in (gemm.N, gemm.K)
    for block_m in _TILES[-1:] if pairs or operands.dtype == "float32" else _TILES:
        if block_m <= power_of_two(gemm.M, _TILES[-1]):
            yield ConvPlan(Variant.GROUPED, block_m, block_n, block_k, num_warps=4, num_stages=_STAGES)


def tiles(p: ConvProblem, direction: Direction, plan: ConvPlan) -> list[tuple[int, int]]:
    """Return (programs, steps of each) of each phase: a step is a tap."""
    rows, columns, _ = grid(p, direction, plan)
    if direction is Direction.FORWARD:
        return [(rows * columns, p.R * p.S)]
    pairs = itertools.product(*map(phases, dimensions(p)))
    return [(rows * columns, r * s) for (_, r), (_, s) in pairs]


def grid(p: ConvProblem, direction: Direction, plan: ConvPlan) -> tuple[int, int, int]:
    """Return the grid: (tiles of pixels, tiles of channels, phases)."""
    gemm = gemm_mnk(p, direction)
    _, phases = tiled_pixels(p, direction)
    return cdiv(gemm.M, plan.block_m), cdiv(gemm.N * p.groups, plan.block_n), phases


def _serves(p: ConvProblem, direction: Direction, operands: Operands) -> bool:
    if direction is Direction.WEIGHT_GRAD or p.groups == 1 or p.R * p.S > _MOST_TAPS:
        return False
    if operands.dtype == "float32" and operands.precision != "tf32":
        return False
    _, N, K = gemm_mnk(p, direction)
    if any(size & (size - 1) for size in (N, K)) or max(N, K) >= _FULL_GROUP:
        return False
    return min(N, K) > 1 and operands.first in _RUNS and operands.output in _RUNS


def _blocks(p: ConvProblem, direction: Direction) -> tuple[int, int]:
    """Numbers of a tile's channels that are computed and that are summed over, of the same groups."""
    _, N, K = gemm_mnk(p, direction)
    groups = max(_CHANNELS // max(N, K), _SMALLEST // min(N, K))
    return groups * N, groups * K


def _takes_norm_grad(plan: ConvPlan, activation: str) -> bool:
    return True


FAMILY = Family(
    name="grouped",
    candidates=candidates,
    tiles=tiles,
    takes_norm_grad=_takes_norm_grad,
    main_loop_efficiency={Variant.GROUPED: 0.7},
)
