"""The depthwise kernels, their plans forced, against float64; and their arithmetic of rows and columns by itself."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from gpukern.conv import reference
from gpukern.conv.families.depthwise import plan as depthwise
from gpukern.conv.families.depthwise.plan import Axis, axes, cut_of, tiles
from gpukern.conv.geometry import Dimension
from gpukern.conv.plan import ConvPlan, Direction, Layout, Operands
from gpukern.conv.problem import ConvProblem, conv_problem
from gpukern.conv.request import Epilogue, Request, operands_of
from gpukern.runtime.device import A100, EMULATED, H100
from gpukern.runtime.integers import cdiv
from gpukern.runtime.mode import EMULATE
from tests.numerics import assert_within, sum_bound

pytestmark = pytest.mark.usefixtures("poisoned")

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """A depthwise convolution; padding is top, bottom, left, right."""

    name: str
    input: tuple[int, int, int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1

    @property
    def problem(self) -> ConvProblem:
        channels = self.input[1]
        weight = (channels * self.multiplier, 1, *self.kernel)
        return conv_problem(self.input, weight, None, self.stride, self.padding, self.dilation, channels)


CASES = (
    Case("3x3", (2, 8, 6, 8), (3, 3), padding=(1, 1, 1, 1)),
    Case("3x3, ragged channels, odd width", (2, 5, 4, 7), (3, 3), padding=(1, 1, 1, 1)),
    Case("3x3, channels of 8 bytes", (1, 20, 3, 5), (3, 3), padding=(1, 1, 1, 1)),
    Case("3x3, many channels", (1, 130, 2, 4), (3, 3), padding=(1, 1, 1, 1)),
    Case("1x1", (3, 24, 2, 6), (1, 1)),
    Case("1x1, stride 2 from the padding on", (1, 8, 5, 6), (1, 1), stride=(2, 2), padding=(1, 1, 1, 1)),
    Case("5x5, lopsided", (1, 8, 5, 6), (5, 5), padding=(2, 2, 3, 1)),
    Case("7x7", (1, 8, 5, 6), (7, 7), padding=(3, 3, 3, 3)),
    Case("2x4 oblong, lopsided", (2, 8, 5, 8), (2, 4), padding=(0, 1, 2, 1)),
    Case("stride 2", (2, 8, 7, 8), (3, 3), stride=(2, 2), padding=(1, 1, 1, 1)),
    Case("stride 2, even, lopsided", (1, 8, 8, 8), (3, 3), stride=(2, 2), padding=(0, 1, 0, 1)),
    Case("stride 3 by 1", (1, 8, 8, 6), (3, 2), stride=(3, 1), padding=(2, 1, 0, 1)),
    Case("stride beyond the kernel", (1, 8, 9, 11), (2, 2), stride=(4, 3), padding=(1, 0, 1, 1)),
    Case("dilation 3 by 2, lopsided", (1, 8, 8, 8), (3, 3), padding=(1, 4, 0, 2), dilation=(3, 2)),
    Case("stride 2, dilation 2", (1, 8, 9, 8), (3, 3), stride=(2, 2), padding=(2, 2, 2, 2), dilation=(2, 2)),
    Case("stride 2, dilation 3", (1, 8, 9, 8), (3, 3), stride=(2, 2), padding=(1, 1, 3, 3), dilation=(3, 3)),
    Case("stride along rows, dilation along columns", (1, 8, 6, 7), (3, 3), (2, 1), (1, 1, 2, 2), (1, 2)),
    Case("multiplier 2", (2, 6, 5, 6), (3, 3), padding=(1, 1, 1, 1), multiplier=2),
    Case("multiplier 3, stride 2", (1, 5, 6, 5), (3, 3), (2, 2), (1, 1, 1, 1), multiplier=3),
    Case("padding beyond the kernel", (1, 8, 2, 3), (2, 2), padding=(3, 2, 4, 3)),
    Case("one pixel", (2, 8, 1, 1), (3, 3), padding=(1, 1, 1, 1)),
    Case("to one pixel", (2, 8, 3, 4), (3, 4)),
)
KINDS = ((torch.float16, "channels_last"), (torch.float32, "NCHW"))


def make(case: Case, dtype: torch.dtype, device, layout: str) -> dict[str, torch.Tensor]:
    p = case.problem
    sizes = {"x": (p.N, p.C, p.H, p.W), "w": (p.K, 1, p.R, p.S), "dy": (p.N, p.K, p.P, p.Q)}
    return {
        name: torch.randn(size).to(device, dtype).contiguous(memory_format=FORMATS[layout])
        for name, size in sizes.items()
    }


OPERANDS = {
    Direction.FORWARD: ("x", "w"),
    Direction.INPUT_GRAD: ("dy", "w"),
    Direction.WEIGHT_GRAD: ("dy", "x"),
}


def truth(p: ConvProblem, direction: Direction, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    if direction is Direction.FORWARD:
        return reference.conv2d(p, first, second, None, None, "none", 0.0)
    gradient = reference.conv2d_input_grad if direction is Direction.INPUT_GRAD else reference.conv2d_weight_grad
    return gradient(p, first, second, False)


def terms(p: ConvProblem, direction: Direction) -> int:
    return p.N * p.P * p.Q if direction is Direction.WEIGHT_GRAD else p.R * p.S * p.group_outputs


def plans(p: ConvProblem, direction: Direction, first, second, output) -> list[ConvPlan]:
    """The candidates, of which one takes whole images and the other small tiles: many strips, lanes and splits."""
    strides = first.stride(), second.stride(), output.stride()
    operands = operands_of(p, direction, strides, True, first.dtype, "ieee")
    found = list(depthwise.candidates(p, direction, operands, EMULATED))
    if not found:
        return []
    height = output.shape[2] if direction is not Direction.WEIGHT_GRAD else p.P
    step = axes(p, direction)[0].outputs
    lanes, _, cols = found[0].box
    small = replace(found[0], box=(max(1, lanes // 4), 2 * step, cols))
    if direction is Direction.WEIGHT_GRAD:
        small = replace(small, splits=min(3, cut_of(p, direction, small).tiles))
    lanes, _, cols = found[-1].box
    return [replace(found[-1], box=(lanes, cdiv(height, step) * step, cols), splits=1), small]


def run(p, direction, choice, first, second, output, bias=None, residual=None, epilogue=None, slope=0.0):
    """Launch ``choice``; returns the statistics, if any are asked for."""
    from gpukern.conv.families.depthwise.launch import prepare
    from gpukern.ops._reduction.launch import sums_and_deviations, with_workspace

    epilogue = epilogue or Epilogue()
    strides = first.stride(), second.stride(), output.stride()
    prepared = prepare(Request(p, direction, *strides, first.dtype, epilogue, EMULATED), choice)
    statistics = None
    if prepared.tiles:
        statistics = sums_and_deviations(p.K, output.device)
        statistics = with_workspace(statistics, p.K, output.device, *prepared.tiles)
    prepared.run(first, second, output, bias, residual, statistics, slope)
    return statistics


@pytest.fixture(autouse=True, scope="module")
def emulation():
    if EMULATE:
        from gpukern.runtime import emulation

        emulation.prepare()


@pytest.mark.parametrize("dtype, layout", KINDS, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("direction", Direction, ids=lambda direction: direction.value)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_float64(case, direction, dtype, layout, device):
    p = case.problem
    made = make(case, dtype, device, layout)
    first, second = (made[name] for name in OPERANDS[direction])
    doubles = [t.double().cpu() for t in (first, second)]
    value = truth(p, direction, *doubles)
    bound = sum_bound(value, truth(p, direction, *(t.abs() for t in doubles)), terms(p, direction), dtype)
    output = torch.empty(value.shape, dtype=dtype, device=device, memory_format=FORMATS[layout])
    chosen = plans(p, direction, first, second, output)
    for choice in chosen:
        output.fill_(float("nan"))
        run(p, direction, choice, first, second, output)
        assert_within(f"{direction.value}, {choice}", output, value, bound)
    both = any(s > 1 and d > 1 for s, d in zip(case.stride, case.dilation, strict=True))
    assert chosen or (direction is Direction.INPUT_GRAD and both)


@pytest.mark.parametrize("dtype, layout", ((torch.bfloat16, "channels_last"), (torch.float16, "NCHW")), ids=str)
def test_epilogue_and_statistics(dtype, layout, device):
    """Bias, residual and activation on the fp32 sum; sums and squared deviations of what is stored, tile by tile."""
    case = Case("", (2, 8, 7, 8), (3, 3), padding=(1, 1, 1, 1))
    p = case.problem
    made = make(case, dtype, device, layout)
    x, w, residual = made["x"], made["w"], made["dy"]
    # A mean far from zero: the difference of large squares would lose all that matters.
    bias = (torch.randn(p.K) + 30).to(residual)
    value = truth(p, Direction.FORWARD, x.double().cpu(), w.double().cpu()) + residual.double().cpu()
    value = (value + bias.double().cpu()[:, None, None]).relu()
    absolute = truth(p, Direction.FORWARD, x.double().cpu().abs(), w.double().cpu().abs()) + value.abs()
    for choice in plans(p, Direction.FORWARD, x, w, residual):
        output = torch.full_like(residual, float("nan"))
        epilogue = Epilogue("relu", residual=True, statistics=True)
        statistics = run(p, Direction.FORWARD, choice, x, w, output, bias, residual, epilogue)
        assert_within("output", output, value, sum_bound(value, absolute, 11, dtype))
        count = cut_of(p, Direction.FORWARD, choice).tiles
        parts = statistics.parts[: 3 * count * p.K].view(3, count, p.K)
        assert (parts[2].sum(0) == p.N * p.P * p.Q).all()
        stored = output.double().cpu()
        mean = stored.mean((0, 2, 3), keepdim=True)
        total, deviations = statistics.sums, statistics.deviations
        expected = stored.sum((0, 2, 3))
        bound = sum_bound(expected, stored.abs().sum((0, 2, 3)), p.N * p.P * p.Q, torch.float32)
        assert_within("sum", total, expected, bound)
        # Each difference from the mean errs by an ulp of the mean.
        expected = (stored - mean).square().sum((0, 2, 3))
        slack = 2.0**-22 * mean.abs().flatten() * (stored - mean).abs().sum((0, 2, 3))
        bound = sum_bound(expected, expected, p.N * p.P * p.Q, torch.float32) + slack
        assert_within("deviations", deviations, expected, bound)


@pytest.mark.parametrize("layout", FORMATS)
def test_infinities_stay_where_they_are(layout, device):
    """A row of x beyond the rows of dy in hand meets no zero; neither does a column beyond those of a tile."""
    case = Case("", (1, 8, 8, 8), (3, 3), padding=(1, 1, 1, 1))
    p = case.problem
    made = make(case, torch.float32, device, layout)
    x, w, dy = made["x"], made["w"], made["dy"].abs()
    x[0, :, 0, 0], x[0, :, 4, 7], x[0, 3, 7, 2] = float("inf"), float("-inf"), float("nan")
    for direction, first, second in (
        (Direction.FORWARD, x, w),
        (Direction.INPUT_GRAD, x, w),
        (Direction.WEIGHT_GRAD, dy, x),
    ):
        value = truth(p, direction, first.double().cpu(), second.double().cpu())
        for choice in plans(p, direction, first, second, w if direction is Direction.WEIGHT_GRAD else x):
            output = torch.empty_like(w if direction is Direction.WEIGHT_GRAD else x)
            run(p, direction, choice, first, second, output)
            output = output.cpu()
            assert torch.equal(output.isnan(), value.isnan()) and torch.equal(output.isposinf(), value.isposinf())


def test_offsets_beyond_32_bits(device):
    """Images 2³⁰ elements apart, in a buffer whose untouched pages cost no memory."""
    torch.use_deterministic_algorithms(False)  # filling 4 GiB with NaN would touch them all
    case = Case("", (3, 8, 4, 4), (3, 3), padding=(1, 1, 1, 1))
    p = case.problem
    made = make(case, torch.float16, device, "channels_last")
    apart = 2**30 + 4096
    buffer = torch.empty(2 * apart + 8 * 16, dtype=torch.float16, device=device)
    far = buffer.as_strided((3, 8, 4, 4), (apart, 1, 32, 8))
    for direction, names in OPERANDS.items():
        first, second = (made[name] for name in names)
        outputs = []
        for image in (first, far.copy_(first)):
            output = torch.empty_like(made["w"] if direction is Direction.WEIGHT_GRAD else made["x"])
            run(p, direction, plans(p, direction, first, second, output)[0], image, second, output)
            outputs.append(output)
        assert torch.equal(*outputs)


# ---- the arithmetic of one axis ------------------------------------------------------------------------------------


@st.composite
def dimension(draw) -> tuple[Dimension, bool]:
    transposed = draw(st.booleans())
    taps, stride, dilation = (draw(st.integers(1, high)) for high in (7, 4, 4))
    hypothesis.assume(not (transposed and stride > 1 and dilation > 1))
    before, inputs = draw(st.integers(0, 8)), draw(st.integers(1, 20))
    outputs = (inputs + before + draw(st.integers(0, 4)) - dilation * (taps - 1) - 1) // stride + 1
    hypothesis.assume(outputs > 0)
    return Dimension(inputs, outputs, taps, stride, dilation, before), transposed


@hypothesis.given(dimension(), st.integers(1, 4), st.integers(1, 4))
@hypothesis.settings(max_examples=300)
def test_every_tap_is_met_once(drawn, steps, cols):
    """Strips and lanes as the kernels walk them, against the definition of the convolution."""
    d, transposed = drawn
    axis = depthwise._axis(d, transposed)
    sources, outputs = (d.outputs, d.inputs) if transposed else (d.inputs, d.outputs)
    met = ((q, q * d.stride + r * d.dilation - d.before, r) for q in range(d.outputs) for r in range(d.taps))
    pairs = ((x, q, r) if transposed else (q, x, r) for q, x, r in met)
    expected = sorted((o, i, r) for o, i, r in pairs if 0 <= o < outputs and 0 <= i < sources)
    assert sorted(_met_by_lanes(axis, outputs, sources, cols * axis.outputs)) == expected
    assert sorted(_met_by_strips(axis, outputs, sources, steps)) == expected


def _met_by_lanes(axis: Axis, outputs: int, sources: int, cols: int):
    for tile in range(axis.out_pitch * cdiv(cdiv(outputs, axis.out_pitch), cols)):
        output, source = _first(axis, tile, cols)
        for j, e in itertools.product(range(cols), range(axis.span(cols))):
            o, i, tap = output + j * axis.out_pitch, source + e * axis.source_pitch, axis.tap(j, e)
            if tap >= 0 and 0 <= o < outputs and 0 <= i < sources:
                yield o, i, tap


def _met_by_strips(axis: Axis, outputs: int, sources: int, steps: int):
    rows = steps * axis.outputs
    for tile in range(axis.out_pitch * cdiv(cdiv(outputs, axis.out_pitch), rows)):
        output, source = _first(axis, tile, rows)
        waiting: list[list] = [[] for _ in range(axis.waiting)]
        for t in range(steps + axis.warm_up):
            for a, e in itertools.product(range(axis.waiting), range(axis.sources)):
                tap = axis.tap(a - axis.warm_up * axis.outputs, e)
                i = source + (t * axis.sources + e) * axis.source_pitch
                if tap >= 0 and 0 <= i < sources:
                    waiting[a].append((i, tap))
            for a in range(axis.outputs):
                o = output + ((t - axis.warm_up) * axis.outputs + a) * axis.out_pitch
                if t >= axis.warm_up and o < outputs:
                    yield from ((o, i, tap) for i, tap in waiting[a])
            waiting = waiting[axis.outputs :] + [[] for _ in range(axis.outputs)]


def _first(axis: Axis, tile: int, size: int) -> tuple[int, int]:
    """The first output of a tile and the first source that it sees, as in the kernels."""
    output = tile % axis.out_pitch + tile // axis.out_pitch * size * axis.out_pitch
    if axis.transposed:
        return output, (output + axis.before) // axis.ratio - axis.source_pitch * axis.back
    return output, output * axis.stride - axis.before


# ---- plans ---------------------------------------------------------------------------------------------------------


def layer(N: int, C: int, size: int, kernel: int, stride: int = 1) -> ConvProblem:
    return conv_problem((N, C, size, size), (C, 1, kernel, kernel), None, (stride,) * 2, (kernel // 2,) * 4, (1, 1), C)


@pytest.mark.parametrize("layout", [Layout.NHWC, Layout.NCHW], ids=lambda layout: layout.value)
@pytest.mark.parametrize("direction", Direction, ids=lambda direction: direction.value)
def test_plans_cover_the_work_and_keep_the_chip_busy(layout, direction):
    operands = Operands("float16", "ieee", layout, layout, layout)
    layers = (
        (1, 96, 112, 3, 2),
        (32, 32, 112, 3),
        (32, 384, 14, 3),
        (32, 960, 7, 3),
        (32, 96, 56, 7),
        (128, 240, 28, 5),
    )
    for sizes, device in itertools.product(layers, (A100, H100)):
        p = layer(*sizes)
        found = list(depthwise.candidates(p, direction, operands, device))
        assert 1 <= len(found) <= 2
        for choice in found:
            lanes, rows, cols = choice.box
            channels = choice.block_m if direction is Direction.WEIGHT_GRAD else choice.block_n
            assert all(size & (size - 1) == 0 for size in (lanes, channels, choice.num_warps))
            assert lanes * channels >= 32 * choice.num_warps
            cut = cut_of(p, direction, choice)
            made, height, width = (p.C, p.H, p.W) if direction is Direction.INPUT_GRAD else (p.K, p.P, p.Q)
            assert channels * cut.channel_blocks >= made and rows * cut.strips >= height
            assert lanes * cols * cut.lane_blocks >= p.N * width
            [(programs, steps)] = tiles(p, direction, choice)
            assert programs * choice.num_warps >= 4 * device.sm_count and steps > 0
            if direction is Direction.WEIGHT_GRAD:
                assert choice.splits <= cut.tiles and p.Q % cols == 0
                # Partial sums are fp32, written and read: less than what is read of x and dy.
                assert 8 * choice.splits * p.K * p.R * p.S <= 2 * p.N * (p.C * p.H * p.W + p.K * p.P * p.Q)


def test_what_is_not_served():
    def found(p: ConvProblem, direction: Direction = Direction.FORWARD, **operands) -> list[ConvPlan]:
        return list(depthwise.candidates(p, direction, Operands("float16", **operands), H100))

    assert found(layer(2, 32, 14, 3))
    assert not found(conv_problem((2, 32, 9, 9), (32, 2, 3, 3), None, (1, 1), (0,) * 4, (1, 1), 16))
    assert not found(layer(2, 32, 14, 3), first=Layout.NCHW)
    assert not found(layer(2, 32, 64, 31))
    assert not any(found(layer(0, 32, 14, 3), direction) for direction in Direction)
    both = conv_problem((2, 32, 14, 14), (32, 1, 3, 3), None, (2, 2), (0,) * 4, (2, 2), 32)
    assert found(both) and not found(both, Direction.INPUT_GRAD) and found(both, Direction.WEIGHT_GRAD)
