"""Plans for the warp-specialised kernel: forward and input gradient of stride 1 in 16 bits, on Hopper alone."""

from __future__ import annotations

from collections.abc import Iterator

from gpukern.conv.families.family import Family
from gpukern.conv.families.tma_conv.plan import best_box, output_sizes, tile_count
from gpukern.conv.geometry import gemm_mnk
from gpukern.conv.plan import ConvPlan, Direction, Operands, Variant
from gpukern.conv.problem import ConvProblem
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.integers import cdiv, power_of_two

#: Tiles of pixels × channels, and the warps that multiply. All compile for sm_90 to loops of at most 63 instructions a
#: step and without a spill, with every epilogue and with Triton 3.6 to 3.9.
_TILES = ((256, 128, 8), (128, 256, 8), (256, 64, 8), (128, 128, 8), (64, 256, 4), (128, 64, 4))
#: With fewer channels on either side a tile would be mostly padding.
_FEWEST_CHANNELS = 32
_MOST_BUFFERS = 6
#: Bytes of barriers and of the buffer that sums over pixels pass through.
_OTHER_SHARED_MEMORY = 4096


def candidates(p: ConvProblem, direction: Direction, operands: Operands, device: DeviceSpec) -> Iterator[ConvPlan]:
    if device.compute_capability != (9, 0) or not _serves(p, direction, operands):
        return
    pixels = output_sizes(p, direction)
    gemm = gemm_mnk(p, direction)
    # A last step of at most 32 channels would be half padding.
    block_k = 32 if 0 < gemm.K % 64 <= 32 else 64
    for block_m, block_n, warps in _TILES:
        if block_n > power_of_two(gemm.N, 64):
            continue
        buffer, tile = 2 * block_k * (block_m + block_n), 2 * block_m * block_n
        buffers = min((device.shared_memory - tile - _OTHER_SHARED_MEMORY) // buffer, _MOST_BUFFERS)
        box = best_box(block_m, *pixels)
        yield ConvPlan(Variant.WARP_SPECIALIZED, block_m, block_n, block_k, warps, num_stages=buffers, box=box)


def tiles(p: ConvProblem, direction: Direction, plan: ConvPlan) -> list[tuple[int, int]]:
    return [(tile_count(p, direction, plan), p.R * p.S * cdiv(gemm_mnk(p, direction).K, plan.block_k))]


def _serves(p: ConvProblem, direction: Direction, operands: Operands) -> bool:
    if direction is Direction.WEIGHT_GRAD or p.stride != (1, 1) or p.groups != 1:
        return False
    if operands.itemsize != 2 or min(p.C, p.K) < _FEWEST_CHANNELS:
        return False
    return operands.first.has_runs and operands.second.has_runs and operands.output.has_runs


def _needs_measurement(plan: ConvPlan) -> bool:
    """Whether plans need a measurement: always, as the interpreter cannot run the kernel."""
    return True


FAMILY = Family(
    name="warp_specialized",
    candidates=candidates,
    tiles=tiles,
    main_loop_efficiency={Variant.WARP_SPECIALIZED: 1.25},
    uses_descriptors=True,
    one_program_per_sm=True,
    emulated=False,
    needs_measurement=_needs_measurement,
)
