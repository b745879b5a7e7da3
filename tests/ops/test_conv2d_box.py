"""Convolutions by boxes of pixels, with tiles small enough that every edge of them is met, against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from gpukern.conv import reference
from gpukern.conv.families import split_k
from gpukern.conv.families.tma_conv import plan as box
from gpukern.conv.launch import prepared_for, run
from gpukern.conv.plan import ConvPlan, Direction, Layout, Operands, Variant
from gpukern.conv.problem import ConvProblem, conv_problem
from gpukern.conv.request import Epilogue
from gpukern.ops._activation.properties import PROPERTIES
from gpukern.ops._activation.reference import activation as reference_activation
from gpukern.runtime.device import A100, H100
from gpukern.runtime.precision import conv_precision
from tests.numerics import FP32_EPS, assert_within, sum_bound, uses_tf32

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DIRECTIONS = (Direction.FORWARD, Direction.INPUT_GRAD)


@dataclass(frozen=True)
class Geometry:
    """``padding`` is top, bottom, left, right."""

    name: str
    input: tuple[int, int, int, int]
    outputs: int
    kernel: tuple[int, int]
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    stride: int = 1

    @property
    def problem(self) -> ConvProblem:
        weight = (self.outputs, self.input[1], *self.kernel)
        return conv_problem(self.input, weight, None, (self.stride,) * 2, self.padding, self.dilation, 1)


#: Ragged channels of both sides; fewer and more images than a box; sizes that end within one.
STRIDE_1 = (
    Geometry("3x3", (3, 24, 9, 7), 40, (3, 3), (1, 1, 1, 1)),
    Geometry("2x2", (1, 8, 6, 6), 136, (2, 2)),
    Geometry("5x5", (1, 72, 5, 6), 8, (5, 5), (2, 2, 2, 2)),
    Geometry("1x7", (2, 40, 3, 11), 24, (1, 7), (0, 0, 3, 3)),
    Geometry("lopsided, dilated 3 by 2", (2, 24, 9, 8), 24, (3, 3), (4, 1, 0, 5), (3, 2)),
    Geometry("padding beyond the kernel", (1, 16, 4, 4), 24, (2, 2), (5, 5, 5, 5)),
    Geometry("batch of 5", (5, 16, 3, 3), 16, (3, 3), (1, 1, 1, 1)),
    Geometry("one pixel", (1, 24, 2, 3), 16, (2, 3)),
)
#: At a stride of 2 a box must not end within the channels of the image that is taken in halves: 32 of them.
STRIDE_2 = (
    Geometry("1x1", (2, 32, 8, 10), 24, (1, 1), stride=2),
    Geometry("1x1, odd padding", (1, 32, 6, 6), 40, (1, 1), (1, 2, 3, 0), stride=2),
    Geometry("2x2", (3, 32, 8, 6), 40, (2, 2), stride=2),
    Geometry("3x3, remainder", (2, 32, 8, 10), 24, (3, 3), (1, 1, 1, 1), stride=2),
    Geometry("3x3, no remainder", (1, 32, 10, 8), 24, (3, 3), (1, 0, 0, 1), stride=2),
    Geometry("5x5, lopsided", (1, 32, 6, 8), 8, (5, 5), (4, 1, 3, 2), stride=2),
    # Of an even dilation all taps have one parity: three phases of the gradient are zeros.
    Geometry("dilated 2 by 3", (2, 32, 10, 12), 24, (3, 3), (2, 2, 3, 3), (2, 3), stride=2),
    Geometry("dilated 2, odd padding", (1, 32, 8, 8), 24, (2, 2), (1, 1, 2, 2), (2, 2), stride=2),
    Geometry("1x7, rows unread", (2, 32, 4, 14), 24, (1, 7), (0, 0, 3, 3), stride=2),
)
#: For what is not about the geometry: the interpreter takes its time for every tile.
TINY = Geometry("tiny", (3, 24, 5, 6), 40, (3, 2), (1, 1, 1, 0))
TINY_2 = Geometry("tiny, stride 2", (3, 32, 6, 4), 40, (3, 2), (1, 1, 0, 0), stride=2)
TINIES = pytest.mark.parametrize("geometry", [TINY, TINY_2], ids=["stride 1", "stride 2"])
SMALL = ConvPlan(Variant.BOX, 32, 32, 16, num_warps=4, num_stages=3, box=(2, 4, 4))


def operands(p: ConvProblem, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """x, w, dy in channels_last."""
    shapes = (p.N, p.C, p.H, p.W), (p.K, p.C, p.R, p.S), (p.N, p.K, p.P, p.Q)
    x, w, dy = (torch.randn(s).to(device, dtype).contiguous(memory_format=torch.channels_last) for s in shapes)
    return x, w * 0.3, dy


def truth(p: ConvProblem, direction: Direction, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    first, second = first.double().cpu(), second.double().cpu()
    if direction is Direction.FORWARD:
        return reference.conv2d(p, first, second, None, None, "none", 0.0)
    return reference.conv2d_input_grad(p, first, second, False)


def check(p: ConvProblem, direction: Direction, first: torch.Tensor, second: torch.Tensor, plan: ConvPlan):
    plan = replace(plan, precision=conv_precision(first.dtype))
    actual, _ = run(prepared_for(p, direction, first, second, True, plan=plan), first, second)
    value, absolute = truth(p, direction, first, second), truth(p, direction, first.abs(), second.abs())
    terms = p.R * p.S * (p.C if direction is Direction.FORWARD else p.K)
    bound = sum_bound(value, absolute, terms, first.dtype, tf32=uses_tf32(first.dtype, plan.precision))
    assert_within(f"{direction.value}, {plan}", actual, value, bound)
    return actual


def check_both(geometry: Geometry, dtype: torch.dtype, device: torch.device, plan: ConvPlan = SMALL) -> None:
    p = geometry.problem
    x, w, dy = operands(p, dtype, device)
    check(p, Direction.FORWARD, x, w, plan)
    check(p, Direction.INPUT_GRAD, dy, w, plan)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", STRIDE_1, ids=lambda geometry: geometry.name)
def test_stride_1(geometry, dtype, device):
    check_both(geometry, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", STRIDE_2, ids=lambda geometry: geometry.name)
def test_stride_2(geometry, dtype, device):
    check_both(geometry, dtype, device)


@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (2, 1, 4, 3)], ids=str)
def test_1x1_at_stride_2_reads_images_of_odd_size(padding, device):
    p = Geometry("odd", (3, 40, 7, 9), 24, (1, 1), padding, stride=2).problem
    x, w, _ = operands(p, torch.float16, device)
    check(p, Direction.FORWARD, x, w, SMALL)


@pytest.mark.parametrize("sides", [(32, 1, 1), (1, 1, 32), (1, 32, 1), (1, 4, 8)], ids=str)
@TINIES
def test_boxes_of_any_shape(geometry, sides, device):
    check_both(geometry, torch.float16, device, replace(SMALL, box=sides))


@pytest.mark.parametrize("sides", [(4, 8, 8), (1, 16, 16), (1, 1, 256)], ids=str)
@TINIES
def test_large_tiles_are_finished_in_two_parts(geometry, sides, device):
    check_both(geometry, torch.float16, device, replace(SMALL, block_m=256, box=sides))


@pytest.mark.parametrize("splits", [2, 5])
@pytest.mark.parametrize("direction", DIRECTIONS, ids=lambda direction: direction.value)
@TINIES
def test_splits(geometry, direction, splits, device):
    """Shares that are not even, and some that are empty. Twice: counters are zero again."""
    p = geometry.problem
    x, w, dy = operands(p, torch.float16, device)
    first = x if direction is Direction.FORWARD else dy
    results = [check(p, direction, first, w, replace(SMALL, splits=splits)) for _ in range(2)]
    assert torch.equal(*results)


@pytest.mark.parametrize("direction", DIRECTIONS, ids=lambda direction: direction.value)
@TINIES
def test_only_the_last_program_of_a_split_writes(geometry, direction, device, monkeypatch):
    """With counters that nobody brings to the last one, what was there before stays."""
    monkeypatch.setattr(split_k, "zeroed_counters", lambda count, device: torch.full((count,), 99).int().to(device))
    p = geometry.problem
    x, w, dy = operands(p, torch.float16, device)
    first, epilogue = (x, Epilogue(statistics=True)) if direction is Direction.FORWARD else (dy, Epilogue())
    plan = replace(SMALL, splits=2)
    output, statistics = run(prepared_for(p, direction, first, w, True, epilogue, plan), first, w)
    assert output.isnan().all()
    assert statistics is None or statistics.sums.isnan().all()


@TINIES
def test_views(geometry, device):
    """Crops of larger tensors: only their channels lie side by side."""
    p = geometry.problem
    N, C, H, W = geometry.input
    x = torch.randn(N + 1, H + 2, W + 3, C + 8, device=device).half().permute(0, 3, 1, 2)
    x = x[1:, 8:, 2:, 1 : W + 1]
    w = (torch.randn(p.K, p.R + 1, p.S + 1, C + 8, device=device) * 0.3).half().permute(0, 3, 1, 2)
    w = w[:, :C, : p.R, : p.S]
    dy = torch.randn(N, p.P + 2, p.Q + 2, p.K + 16, device=device).half().permute(0, 3, 1, 2)[:, : p.K, 1:-1, 1:-1]
    check(p, Direction.FORWARD, x, w, SMALL)
    check(p, Direction.INPUT_GRAD, dy, w, SMALL)


@TINIES
def test_residual_of_an_input_gradient(geometry, device):
    """Read in the halves in which the gradient is written; the epilogue of a transposed convolution."""
    p = geometry.problem
    x, w, dy = operands(p, torch.float16, device)
    prepared = prepared_for(p, Direction.INPUT_GRAD, dy, w, True, Epilogue(residual=True), SMALL)
    actual, _ = run(prepared, dy, w, None, x)
    value = truth(p, Direction.INPUT_GRAD, dy, w) + x.double().cpu()
    absolute = truth(p, Direction.INPUT_GRAD, dy.abs(), w.abs()) + x.double().cpu().abs()
    assert_within(str(p), actual, value, sum_bound(value, absolute, p.R * p.S * p.K + 1, torch.float16))


@pytest.mark.parametrize("sides", [(2, 4, 4), (4, 8, 8)], ids=["whole", "in parts"])
@pytest.mark.parametrize("name", ["none", *PROPERTIES])
def test_epilogue(name, sides, device):
    """Bias, residual and activation are added to the fp32 sum: one rounding."""
    p = TINY.problem
    x, w, residual = operands(p, torch.float16, device)
    bias = torch.randn(p.K).to(x)
    plan = replace(SMALL, block_m=math.prod(sides), box=sides)
    prepared = prepared_for(p, Direction.FORWARD, x, w, True, Epilogue(name, residual=True), plan)
    actual, _ = run(prepared, x, w, bias, residual, 0.1)

    def sums(*tensors: torch.Tensor) -> torch.Tensor:
        x, w, bias, residual = (t.double().cpu() for t in tensors)
        return truth(p, Direction.FORWARD, x, w) + bias[:, None, None] + residual

    value = reference_activation(sums(x, w, bias, residual), name, 0.1)
    absolute = sums(*(t.abs() for t in (x, w, bias, residual)))
    # The steepest activation, hardswish, has a slope of 1.5.
    bound = 1.5 * sum_bound(value, absolute, p.C * p.R * p.S + 2, torch.float16)
    assert_within(name, actual, value, bound)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("sides", [(2, 4, 4), (4, 8, 8)], ids=["whole", "in parts"])
@TINIES
def test_statistics(geometry, sides, splits, device):
    """Of the output as stored: what a box holds beyond the image does not count."""
    p = geometry.problem
    x, w, _ = operands(p, torch.float16, device)
    bias = torch.full((p.K,), 30.0).to(x)
    plan = replace(SMALL, block_m=math.prod(sides), box=sides, splits=splits)
    prepared = prepared_for(p, Direction.FORWARD, x, w, True, Epilogue(statistics=True), plan)
    y, statistics = run(prepared, x, w, bias)
    total, deviations = statistics.sums, statistics.deviations
    values, pixels = y.double().cpu(), p.N * p.P * p.Q
    # As tests/numerics.py: fp32 additions in any order. The mean's error enters the deviations squared, for each pixel.
    eps = 6 * FP32_EPS * pixels**0.5
    assert_within("sum", total, values.sum((0, 2, 3)), eps * values.abs().sum((0, 2, 3)))
    squares = (values - values.mean((0, 2, 3), keepdim=True)).square().sum((0, 2, 3))
    off = pixels * (eps * values.abs().mean((0, 2, 3))).square()
    assert_within("deviations", deviations, squares, eps * squares + off + 2 * (off * squares).sqrt())


@pytest.mark.parametrize("geometry", [STRIDE_1[1], STRIDE_2[2]], ids=["stride 1", "stride 2"])
def test_nan_and_infinity_reach_what_they_should(geometry, device):
    """In the first channel of a tap: where a step ends beyond the channels, it must not meet those of the next."""
    p = geometry.problem
    x, w, dy = operands(p, torch.float16, device)
    x[0, 0, 0, 0], dy[0, 0, 0, 0] = float("nan"), float("-inf")
    infinite = w.clone()
    infinite[3, 0, 1, 1] = float("inf")
    # A tap in the padding is zero times a weight: no infinity there.
    assert not any(p.padding)
    for direction, first, second in ((Direction.FORWARD, x, infinite), (Direction.INPUT_GRAD, dy, w)):
        actual, _ = run(prepared_for(p, direction, first, second, True, plan=SMALL), first, second)
        value = truth(p, direction, first, second)
        assert torch.equal(actual.cpu().isnan(), value.isnan())
        assert torch.equal(actual.cpu().isinf(), value.isinf())


# ---- the plan ------------------------------------------------------------------------------------------------------

LAYER = Geometry("ResNet", (32, 64, 56, 56), 64, (3, 3), (1, 1, 1, 1))
HALF = Operands("float16")


def candidates(geometry: Geometry, direction=Direction.FORWARD, operands=HALF, device=H100) -> list[ConvPlan]:
    return list(box.candidates(geometry.problem, direction, operands, device))


def test_serves_only_what_the_kernel_can():
    assert candidates(LAYER) and candidates(LAYER, Direction.INPUT_GRAD)
    assert candidates(LAYER, operands=Operands("float32", "tf32"))
    assert not candidates(LAYER, device=A100)
    assert not candidates(LAYER, Direction.WEIGHT_GRAD)
    assert not candidates(LAYER, operands=Operands("float32", "ieee"))
    for name in ("first", "second", "output"):
        assert candidates(LAYER, operands=replace(HALF, **{name: Layout.NHWC_STRIDED}))
        assert not candidates(LAYER, operands=replace(HALF, **{name: Layout.NCHW}))
    assert not candidates(replace(LAYER, kernel=(1, 1)))
    assert not candidates(replace(LAYER, stride=3))


@pytest.mark.parametrize("direction", DIRECTIONS, ids=lambda direction: direction.value)
def test_stride_2_needs_whole_halves(direction):
    layer = replace(LAYER, stride=2)
    assert candidates(layer, direction)
    assert not candidates(replace(layer, input=(32, 64, 55, 56)), direction)
    # A step or a tile that ends within the channels would meet those of the next pixel.
    assert not candidates(replace(layer, input=(32, 72, 56, 56)), direction)
    one_tap = replace(layer, kernel=(1, 1), padding=(0, 0, 0, 0), input=(32, 72, 55, 56))
    assert bool(candidates(one_tap, direction)) == (direction is Direction.FORWARD)


@pytest.mark.parametrize(
    "block_m, sizes, expected",
    [
        (128, (32, 56, 56), (2, 8, 8)),
        (128, (32, 28, 28), (8, 4, 4)),
        (128, (32, 14, 14), (32, 2, 2)),
        (128, (128, 7, 7), (128, 1, 1)),
        (256, (1, 64, 64), (1, 16, 16)),
        (64, (1, 7, 7), (1, 8, 8)),
    ],
)
def test_boxes_cover_little_beyond_the_image(block_m, sizes, expected):
    assert box.best_box(block_m, *sizes) == expected


@pytest.mark.parametrize("direction", DIRECTIONS, ids=lambda direction: direction.value)
@pytest.mark.parametrize("geometry", [LAYER, *STRIDE_1, *STRIDE_2], ids=lambda geometry: geometry.name)
def test_candidates_fit(geometry, direction):
    p = geometry.problem
    for plan in candidates(geometry, direction):
        assert math.prod(plan.box) == plan.block_m and max(plan.box) <= 256
        assert plan.num_stages * (plan.block_m + plan.block_n) * plan.block_k * 2 <= H100.shared_memory
        steps = box.tiles(p, direction, plan)
        assert plan.num_stages <= max(share for _, share in steps)
        # Every product is in some program's sum.
        columns, reduction = (p.K, p.C) if direction is Direction.FORWARD else (p.C, p.K)
        pixels = p.N * p.P * p.Q if direction is Direction.FORWARD else p.N * p.H * p.W / p.stride[0] ** 2
        done = sum(count * share for count, share in steps) * plan.block_m * plan.block_n * plan.block_k
        assert done >= pixels * columns * reduction * p.R * p.S


def test_small_problems_get_small_tiles_and_splits():
    plans = candidates(Geometry("last stage, batch 1", (1, 512, 7, 7), 512, (3, 3), (1, 1, 1, 1)))
    assert {plan.block_m for plan in plans} == {64}
    assert any(plan.splits > 1 for plan in plans)
    assert all(plan.splits == 1 for plan in candidates(LAYER))
