"""Plans for depthwise convolution: which problems the kernels support, and how work is divided among programs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from gpukern.conv.families.family import Family
from gpukern.conv.geometry import Dimension, dimensions
from gpukern.conv.plan import ConvPlan, Direction, Layout, Operands, Variant
from gpukern.conv.problem import ConvProblem
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.integers import cdiv, power_of_two

_THREADS = 128
# Limits on the registers of a thread. With the lower limit, three or four programs share a multiprocessor.
_REGISTERS = (145, 204)
_RESIDENT = 4
# Cost of a program's prologue and epilogue, in rows.
_STARTUP = 6
# The parts of a weight gradient's sums are read back, one after the other.
_MOST_SPLITS = 256
_RUNS = (Layout.NHWC, Layout.NHWC_STRIDED, Layout.CHANNELS)


@dataclass(frozen=True)
class Axis:
    """Rows or columns as the kernels walk them, from positions in the source to positions in the output.

    Forward: ``source = output · stride + tap · dilation − before``. For each phase, outputs ``out_pitch`` apart see
    sources ``source_pitch`` apart and no others. In these units there is no dilation: ``source = output · ratio +
    tap``, where each is counted from the first that its tile reads.

    Input gradient (``transposed``): a source is a position in dy, which gives ``output = source · ratio + tap`` of dx,
    the padding counted among the outputs. Either the stride or the dilation must be 1.
    """

    taps: int
    stride: int
    before: int  # padding above or to the left
    ratio: int
    source_pitch: int
    out_pitch: int
    transposed: bool

    @property
    def sources(self) -> int:
        """Number of sources that a step takes."""
        return 1 if self.transposed else self.ratio

    @property
    def outputs(self) -> int:
        """Number of outputs that a step completes."""
        return self.ratio if self.transposed else 1

    @property
    def back(self) -> int:
        """Transposed: number of sources from the first that a multiple of the ratio reads to its own."""
        return (self.taps - 1 - self.before % self.ratio) // self.ratio

    @property
    def warm_up(self) -> int:
        """Steps before the first that completes an output."""
        if self.transposed:
            return self.back + (self.before % self.ratio > 0)
        return (self.taps - 1) // self.ratio

    @property
    def waiting(self) -> int:
        """Outputs that have some of their sources, or will have after the next step."""
        return (self.warm_up + 1) * self.outputs

    @property
    def first_is_odd(self) -> bool:
        """Whether the first source of a tile at output 0 is odd."""
        first = self.before // self.ratio - self.back if self.transposed else -self.before
        return first % 2 == 1

    def span(self, outputs: int) -> int:
        """Return the number of sources that ``outputs`` neighbours read."""
        if self.transposed:
            return self.back + (self.before % self.ratio + outputs - 1) // self.ratio + 1
        return (outputs - 1) * self.ratio + self.taps

    def tap(self, output: int, source: int) -> int:
        """Return the tap that joins two positions of a tile; -1 if none does."""
        if self.transposed:
            tap = self.before % self.ratio + output - self.ratio * (source - self.back)
        else:
            tap = source - output * self.ratio
        return tap if 0 <= tap < self.taps else -1


@dataclass(frozen=True)
class Dots:
    """The sums of ``outputs`` neighbours along ``axis`` as products of words of four neighbouring sources, bytes.

    Byte b of a word that starts at source s is multiplied with tap s + b − first of an output whose first source is
    ``first``: ``s − first`` is the *shift* of the filter's word.
    """

    axis: Axis
    outputs: int
    #: Neighbouring channels of a thread.
    channels: int

    @property
    def words(self) -> tuple[int, ...]:
        """The first sources of the words, as few as each output can have all its taps from one or, beyond four, two."""
        taps, ratio = self.axis.taps, self.axis.ratio
        if taps > 4:
            return tuple(range(0, self.axis.span(self.outputs), 4))
        starts = [0]
        for first in range(0, self.outputs * ratio, ratio):
            if first + taps > starts[-1] + 4:
                starts.append(first)
        return tuple(starts)

    def shifts_of(self, output: int) -> tuple[int | None, ...]:
        """Return the shift of each word for one output; None for words that it does not read."""
        first = output * self.axis.ratio
        last = first + self.axis.taps
        whole = [start for start in self.words if start <= first and last <= start + 4]
        used = whole[:1] or [start for start in self.words if start < last and start + 4 > first]
        return tuple(start - first if start in used else None for start in self.words)

    @property
    def shifts(self) -> tuple[int, ...]:
        """All shifts that occur."""
        found = {shift for output in range(self.outputs) for shift in self.shifts_of(output)}
        return tuple(sorted(shift for shift in found if shift is not None))


class Cut(NamedTuple):
    """Numbers of strips, blocks of column groups and blocks of channels that a launch is divided into.

    A plan's ``box`` is (lanes, rows, cols): a column group, ``lane`` in the code, is ``cols`` neighbouring outputs of a
    row, walked down ``rows`` of them, a strip; column groups are counted through the rows of all images.
    """

    strips: int
    lane_blocks: int
    channel_blocks: int

    @property
    def tiles(self) -> int:
        return self.strips * self.lane_blocks


def axes(p: ConvProblem, direction: Direction) -> tuple[Axis, Axis]:
    """Return the axes of rows and of columns; the weight gradient walks as the forward convolution does."""
    vertical, horizontal = (_axis(d, direction is Direction.INPUT_GRAD) for d in dimensions(p))
    return vertical, horizontal


def _axis(d: Dimension, transposed: bool) -> Axis:
    if transposed:
        return Axis(d.taps, d.stride, d.before, d.stride, d.dilation, d.dilation, True)
    shared = math.gcd(d.stride, d.dilation)
    return Axis(d.taps, d.stride, d.before, d.stride // shared, d.dilation, d.dilation // shared, False)


def candidates(p: ConvProblem, direction: Direction, operands: Operands, device: DeviceSpec) -> Iterator[ConvPlan]:
    if not _serves(p, direction, operands):
        return
    seen = set()
    for limit in _REGISTERS:
        thread = _thread(p, direction, operands, limit)
        if thread and thread not in seen:
            seen.add(thread)
            yield _plan(p, direction, operands, *thread, device)


def tiles(p: ConvProblem, direction: Direction, plan: ConvPlan) -> list[tuple[int, int]]:
    """Return (programs, steps of each): a step is one tap of all column groups."""
    vertical, horizontal = axes(p, direction)
    cut = cut_of(p, direction, plan)
    # In the input gradient of a strided convolution, each output has only its share of the taps.
    rows = plan.own_box[1] + vertical.warm_up * vertical.outputs
    steps = cdiv(rows * p.R * p.S * _reduction(p, direction), vertical.outputs * horizontal.outputs)
    if direction is Direction.WEIGHT_GRAD:
        return [(cut.channel_blocks * plan.splits, tiles_per_split(p, plan) * steps)]
    return [(cut.tiles * cut.channel_blocks, steps)]


def cut_of(p: ConvProblem, direction: Direction, plan: ConvPlan) -> Cut:
    channels = plan.block_m if direction is Direction.WEIGHT_GRAD else plan.block_n
    return _cut(p, direction, channels, *plan.own_box)


def tiles_per_split(p: ConvProblem, plan: ConvPlan) -> int:
    """Return the weight gradient's number of tiles per split."""
    return cdiv(cut_of(p, Direction.WEIGHT_GRAD, plan).tiles, plan.splits)


def tile_sums(p: ConvProblem, plan: ConvPlan) -> int:
    """Return the sums of a weight gradient's tile: of every tap."""
    return p.R * p.S * plan.block_m


def _serves(p: ConvProblem, direction: Direction, operands: Operands) -> bool:
    if not p.N or p.groups == 1 or p.group_inputs > 1 or operands.precision == "tf32x3":
        return False
    if any(axis.transposed and axis.ratio > 1 and axis.out_pitch > 1 for axis in axes(p, direction)):
        return False
    layouts = _images(p, direction, operands)
    return all(layout in _RUNS for layout in layouts) or _in_planes(p, direction, operands)


def _in_planes(p: ConvProblem, direction: Direction, operands: Operands) -> bool:
    layouts = _images(p, direction, operands)
    return Layout.NCHW in layouts and not any(layout in _RUNS for layout in layouts)


def _images(p: ConvProblem, direction: Direction, operands: Operands) -> list[Layout]:
    """Layouts of the two image tensors. One of single pixels fits any layout, so it counts only if both are."""
    if direction is Direction.WEIGHT_GRAD:
        layouts = operands.first, operands.second
    else:
        layouts = operands.first, operands.output
    pixels = [p.P * p.Q, p.H * p.W]
    if direction is Direction.FORWARD:
        pixels.reverse()
    return [layout for layout, size in zip(layouts, pixels, strict=True) if size > 1 or max(pixels) == 1]


def _reduction(p: ConvProblem, direction: Direction) -> int:
    """Number of channels that are summed over."""
    return p.group_outputs if direction is Direction.INPUT_GRAD else 1


def _made(p: ConvProblem, direction: Direction) -> tuple[int, int, int]:
    """Channels, rows and columns that are divided among programs."""
    return (p.C, p.H, p.W) if direction is Direction.INPUT_GRAD else (p.K, p.P, p.Q)


def _thread(p: ConvProblem, direction: Direction, operands: Operands, limit: int) -> tuple[int, int] | None:
    """Return the (channels, columns) of a thread with the fewest instructions per output that fit the registers."""
    vertical, horizontal = axes(p, direction)
    in_planes = _in_planes(p, direction, operands)
    words, _, output_words = (itemsize / 4 for itemsize in operands.itemsizes)
    best: tuple[float, int, int] | None = None
    for channels, step in itertools.product(_widths(p, operands, in_planes), (1, 2, 4)):
        cols = step * horizontal.outputs
        if not _cuts_evenly(p, direction, in_planes, horizontal, cols, step):
            continue
        loads = vertical.sources * horizontal.span(cols) * _reduction(p, direction)
        held: float = p.R * p.S * _reduction(p, direction) + vertical.waiting * cols
        if direction is Direction.WEIGHT_GRAD:
            held += loads + (loads + cols) * words
        else:
            # A step's sources and the next one's; a bias, statistics or a scale, and an addend in flight.
            held += 2 * loads * words + 1 + (4 + cols * output_words if direction is Direction.FORWARD else 0)
        # Elements in an access, each of which takes three instructions or so; a source is converted, one by one.
        width = channels if not in_planes else 2 if cols % 2 == 0 else 1
        cost = (loads * (1 + 3 / width) / vertical.outputs + 3 * cols / width) / cols
        # One address or predicate per access.
        if channels * held + loads <= limit and (best is None or cost < best[0]):
            best = cost, channels, cols
    return best[1:] if best else None


def _widths(p: ConvProblem, operands: Operands, in_planes: bool) -> tuple[int, ...]:
    """Candidate numbers of channels per thread: neighbours, as many as one access takes."""
    if in_planes:
        return (1,)
    if p.group_outputs > 1:
        return (1,)  # threads of neighbouring outputs read one source
    return tuple(width for width in (1, 2, 4, 8, 16) if p.C % width == 0 and width * operands.itemsizes[0] <= 16)


def _cuts_evenly(p: ConvProblem, direction: Direction, in_planes: bool, axis: Axis, cols: int, step: int) -> bool:
    """Whether groups of ``cols`` columns are allowed; a ``step`` of 1 always is."""
    if step == 1:
        return True
    if direction is Direction.WEIGHT_GRAD and p.Q % (cols * axis.out_pitch):
        return False  # a truncated column group would read columns of x that its dy does not have
    # In NCHW, columns that do not come in pairs are better left to adjacent threads.
    return not in_planes or (p.W % 2 == 0 and p.Q % 2 == 0 and axis.out_pitch == 1)


def _plan(
    p: ConvProblem, direction: Direction, operands: Operands, width: int, cols: int, device: DeviceSpec
) -> ConvPlan:
    made = _made(p, direction)[0]
    lanes = power_of_two(_lanes(p, direction, cols))
    if _in_planes(p, direction, operands):
        lanes = min(lanes, 32)
        channels = min(_THREADS * width // lanes, power_of_two(made))
    else:
        # The largest block of a pixel's channels that leaves few threads idle beyond the last channel.
        channels = min((64, 32, 16), key=lambda block: (cdiv(made, block) * block, -block))
        channels = max(width, min(channels, power_of_two(made)))
        lanes = min(lanes, _THREADS * width // channels)
    warps = max(1, lanes * channels // (32 * width))
    if direction is Direction.WEIGHT_GRAD:
        # So few splits of so few channels need more threads each to keep the memory busy.
        while warps < 8 and cdiv(made, channels) * _MOST_SPLITS * warps < device.sm_count * _RESIDENT * 2:
            lanes, warps = 2 * lanes, 2 * warps
        rows, splits = _rows_and_splits(p, channels, lanes, cols, device)
        return ConvPlan(Variant.DEPTHWISE, channels, 1, lanes * cols, warps, 1, splits=splits, box=(lanes, rows, cols))
    rows = _rows(p, direction, channels, lanes, cols, device)
    return ConvPlan(Variant.DEPTHWISE, lanes * cols, channels, 1, warps, 1, box=(lanes, rows, cols))


def _rows(p: ConvProblem, direction: Direction, channels: int, lanes: int, cols: int, device: DeviceSpec) -> int:
    """Rows of a strip: tall strips have fewer rows read by two strips, short ones keep all multiprocessors busy."""
    axis, _ = axes(p, direction)

    def seconds(rows: int) -> tuple[float, int]:
        cut = _cut(p, direction, channels, lanes, rows, cols)
        rounds = max(_RESIDENT, cdiv(cut.tiles * cut.channel_blocks, device.sm_count))
        return rounds * (rows / axis.outputs + axis.warm_up + _STARTUP), -rows

    return min(_strip_heights(axis, _made(p, direction)[1]), key=seconds)


def _rows_and_splits(p: ConvProblem, channels: int, lanes: int, cols: int, device: DeviceSpec) -> tuple[int, int]:
    """Rows of a strip as in :func:`_rows`, and splits that write little compared with what they read."""
    axis, _ = axes(p, Direction.WEIGHT_GRAD)
    read = p.N * (p.C * p.H * p.W + p.K * p.P * p.Q)
    most = max(1, min(_MOST_SPLITS, read // (8 * p.K * p.R * p.S)))

    def best_splits(rows: int) -> tuple[float, int, int]:
        cut = _cut(p, Direction.WEIGHT_GRAD, channels, lanes, rows, cols)
        splits = min(most, cut.tiles, cdiv(_RESIDENT * device.sm_count, cut.channel_blocks))
        share = cdiv(cut.tiles, splits)
        splits = cdiv(cut.tiles, share)
        rounds = max(_RESIDENT, cdiv(splits * cut.channel_blocks, device.sm_count))
        return rounds * (share * (rows + axis.warm_up + 1) + _STARTUP), -rows, splits

    _, rows, splits = min(map(best_splits, _strip_heights(axis, p.P)))
    return -rows, splits


def _strip_heights(axis: Axis, rows: int) -> set[int]:
    """Return the heights that divide the rows of a phase most evenly among some number of strips."""
    steps = cdiv(cdiv(rows, axis.out_pitch), axis.outputs)
    return {cdiv(steps, strips) * axis.outputs for strips in range(1, steps + 1)}


def _lanes(p: ConvProblem, direction: Direction, cols: int) -> int:
    """Number of column groups in all images."""
    _, axis = axes(p, direction)
    return p.N * axis.out_pitch * cdiv(cdiv(_made(p, direction)[2], axis.out_pitch), cols)


def _cut(p: ConvProblem, direction: Direction, channels: int, lanes: int, rows: int, cols: int) -> Cut:
    axis, _ = axes(p, direction)
    made, height, _ = _made(p, direction)
    strips = axis.out_pitch * cdiv(cdiv(height, axis.out_pitch), rows)
    return Cut(strips, cdiv(_lanes(p, direction, cols), lanes), cdiv(made, channels))


def _takes_norm_grad(plan: ConvPlan, activation: str) -> bool:
    return True


FAMILY = Family(
    name="depthwise",
    candidates=candidates,
    tiles=tiles,
    takes_norm_grad=_takes_norm_grad,
    main_loop_efficiency={Variant.DEPTHWISE: 0.4},
    elementwise=frozenset((Variant.DEPTHWISE,)),
    tile_sums=tile_sums,
    takes_quantized=True,
)
