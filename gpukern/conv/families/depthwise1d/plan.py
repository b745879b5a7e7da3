"""Plans for depthwise convolutions of sequences: which problems the kernels support, and how work is divided."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gpukern.conv.families.family import Family
from gpukern.conv.plan import ConvPlan, Direction, Layout, Operands, Variant
from gpukern.conv.problem import ConvProblem
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.integers import cdiv, power_of_two

_THREADS = 128
#: Elements of a thread's outputs: two vectors where positions are adjacent; four positions of one where channels are,
#: which share the sources between the first and the last; two single elements where nothing is aligned.
_IN_RUNS, _UNALIGNED = 4, 2
#: A thread holds a weight for each tap, and the sources that they reach.
_MOST_TAPS = 8
_MOST_SPLITS = 256
#: Programs on a multiprocessor that keep its memory busy.
_RESIDENT = 8
_RUNS = (Layout.NHWC, Layout.NHWC_STRIDED, Layout.CHANNELS)


@dataclass(frozen=True)
class Taps:
    """For each tap, how far before or after an output its source is; and the outputs of a group."""

    offsets: tuple[int, ...]
    width: int

    def needed(self, joined: bool) -> tuple[int, ...]:
        """The sources of a group, counted from its first output: or the vectors that they lie in, from its own."""
        found = {offset + i for offset in self.offsets for i in range(self.width)}
        return tuple(sorted({source // self.width for source in found} if joined else found))

    def element(self, joined: bool, source: int) -> int:
        """The place of a source among the elements of all that is needed."""
        vector, i = divmod(source, self.width) if joined else (source, 0)
        return self.needed(joined).index(vector) * (self.width if joined else 1) + i


@dataclass(frozen=True)
class Access:
    """How a tensor is accessed: ``joined``, a group at a time, or one of its positions after the other.

    ``channels`` and ``positions``: the power of two that divides the start of every run of channels, or of positions,
    and its length; 1 where these are not adjacent.
    """

    joined: bool
    channels: int
    positions: int


def candidates(p: ConvProblem, direction: Direction, operands: Operands, device: DeviceSpec) -> Iterator[ConvPlan]:
    if not _serves(p, operands):
        return
    positions, channels = _tile(p, direction, operands)
    if direction is Direction.WEIGHT_GRAD:
        splits = _splits(p, positions, channels, device)
        yield ConvPlan(Variant.DEPTHWISE_1D, channels, 1, positions, _THREADS // 32, 1, splits=splits)
    else:
        yield ConvPlan(Variant.DEPTHWISE_1D, positions, channels, 1, _THREADS // 32, 1)


def tiles(p: ConvProblem, direction: Direction, plan: ConvPlan) -> list[tuple[int, int]]:
    """Return (programs, steps of each): a step is one tap of a tile."""
    if direction is Direction.WEIGHT_GRAD:
        return [(cdiv(p.C, plan.block_m) * plan.splits, tiles_per_split(p, plan) * p.S)]
    return [(p.N * blocks(p, direction, plan.block_m) * cdiv(p.C, plan.block_n), p.S)]


def offsets(p: ConvProblem, direction: Direction) -> tuple[int, ...]:
    """Return, for each tap, how far before or after an output its source is."""
    forward = tuple(tap * p.dilation[1] - p.padding[2] for tap in range(p.S))
    return tuple(-offset for offset in forward) if direction is Direction.INPUT_GRAD else forward


def group_width(p: ConvProblem, direction: Direction, itemsize: int, in_runs: bool) -> int:
    """Return the outputs of a group: as many as a vector of the source has elements, if its start is aligned."""
    if in_runs:
        return _IN_RUNS
    return math.gcd(16 // itemsize, _read(p, direction))


def blocks(p: ConvProblem, direction: Direction, positions: int) -> int:
    """Return the number of tiles along a sequence."""
    return cdiv(_made(p, direction), positions)


def tiles_per_split(p: ConvProblem, plan: ConvPlan) -> int:
    return cdiv(p.N * blocks(p, Direction.WEIGHT_GRAD, plan.block_k), plan.splits)


def tile_sums(p: ConvProblem, plan: ConvPlan) -> int:
    """Return the sums of a weight gradient's tile: of every tap."""
    return p.S * plan.block_m


def _serves(p: ConvProblem, operands: Operands) -> bool:
    if not p.N or p.pool or not 1 < p.groups == p.C == p.K or operands.precision == "tf32x3":
        return False
    of_sequences = p.H == p.R == p.P == 1 and p.padding[:2] == (0, 0)
    return of_sequences and p.stride[1] == 1 and p.S <= _MOST_TAPS


def _made(p: ConvProblem, direction: Direction) -> int:
    """Length of the sequences that are divided among programs."""
    return p.W if direction is Direction.INPUT_GRAD else p.Q


def _read(p: ConvProblem, direction: Direction) -> int:
    """Length of the source's sequences."""
    return p.Q if direction is Direction.INPUT_GRAD else p.W


def _tile(p: ConvProblem, direction: Direction, operands: Operands) -> tuple[int, int]:
    """(positions, channels) of a tile: long where positions are adjacent, for what two tiles read is read twice."""
    source = operands.second if direction is Direction.WEIGHT_GRAD else operands.first
    in_runs, most = source in _RUNS, power_of_two(p.C)
    width = group_width(p, direction, operands.itemsize, in_runs)
    vector, length = 16 // operands.itemsize, _made(p, direction)
    if in_runs:
        channels = min(most, 32)
        return min(_THREADS * _IN_RUNS * vector // channels, power_of_two(length, low=16)), channels
    elements = _THREADS * (2 * vector if width == vector else max(_UNALIGNED, width))
    lengths = (1 << i for i in range(4, elements.bit_length()) if 1 << i <= power_of_two(length, low=16))
    # A tile costs some 50 positions more than it has: sources that two tiles read, addresses, weights.
    positions = min(lengths, key=lambda each: (cdiv(length, each) * (each + 48), -each))
    return positions, min(most, elements // positions)


def _splits(p: ConvProblem, positions: int, channels: int, device: DeviceSpec) -> int:
    """Splits that keep all multiprocessors busy and write little compared with what they read."""
    tiles = p.N * cdiv(p.Q, positions)
    read = p.N * p.C * (p.W + p.Q)
    most = max(1, min(_MOST_SPLITS, tiles, read // (64 * p.K * p.S)))
    splits = min(most, cdiv(_RESIDENT * device.sm_count, cdiv(p.C, channels)))
    return cdiv(tiles, cdiv(tiles, splits))


FAMILY = Family(
    name="depthwise1d",
    candidates=candidates,
    tiles=tiles,
    main_loop_efficiency={Variant.DEPTHWISE_1D: 0.8},
    elementwise=frozenset((Variant.DEPTHWISE_1D,)),
    tile_sums=tile_sums,
)
