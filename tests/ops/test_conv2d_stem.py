"""The convolution of few channels, forced at small tiles, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from gpukern.conv.families.tma_stem.launch import prepare
from gpukern.conv.families.tma_stem.plan import candidates, packed, tiles, window
from gpukern.conv.plan import ConvPlan, Direction, Layout, Operands, Variant
from gpukern.conv.problem import ConvProblem, conv_problem
from gpukern.conv.reference import conv2d as reference
from gpukern.conv.request import Epilogue, Request
from gpukern.ops._reduction.functions import Statistics
from gpukern.ops._reduction.launch import sums_and_deviations, with_workspace
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.device import A100, H100
from gpukern.runtime.integers import power_of_two
from gpukern.runtime.precision import conv_precision
from gpukern.runtime.strides import dense_strides
from tests.numerics import assert_within, sum_bound, uses_tf32
from tests.ops.conv_cases import Case, as_problem

pytestmark = pytest.mark.usefixtures("poisoned")

CASES = (
    Case("ResNet", (2, 3, 21, 18), 24, (7, 7), stride=2, padding=3),
    Case("MobileNet, padded as TensorFlow does", (2, 3, 12, 10), 16, (3, 3), stride=2, padding=(0, 1, 0, 1)),
    Case("lopsided the other way", (1, 3, 11, 13), 8, (3, 5), stride=2, padding=(2, 0, 3, 1)),
    Case("ConvNeXt", (3, 3, 16, 20), 40, (4, 4), stride=4),
    Case("patches with pixels left over", (1, 3, 18, 19), 24, (4, 4), stride=4),
    Case("ViT", (1, 3, 33, 32), 24, (16, 16), stride=16),
    Case("VGG", (2, 3, 7, 9), 72, (3, 3), padding=1),
    Case("AlexNet", (1, 3, 31, 35), 16, (11, 11), stride=4, padding=2),
    Case("LeNet", (2, 1, 14, 14), 24, (5, 5), padding=2),
    Case("two channels", (2, 2, 9, 10), 16, (3, 3), stride=2, padding=1),
    Case("four channels", (2, 4, 9, 10), 16, (3, 3), stride=2, padding=1),
    Case("eight channels", (1, 8, 9, 10), 16, (3, 2), stride=(1, 2), padding=1),
    Case("strides 3 by 1", (1, 3, 10, 9), 16, (2, 3), stride=(3, 1)),
    Case("stride beyond the kernel", (1, 3, 13, 14), 16, (2, 2), stride=4),
    Case("padding beyond the kernel", (1, 3, 4, 4), 16, (2, 2), padding=5),
    Case("one output pixel", (1, 3, 5, 6), 16, (5, 6)),
)
KINDS = ((torch.float16, "NCHW"), (torch.bfloat16, "channels_last"), (torch.float32, "every second pixel"))
RESNET = CASES[0]


def problem_of(case: Case) -> ConvProblem:
    if isinstance(case.padding, int):
        return as_problem(case)
    stride = (case.stride, case.stride) if isinstance(case.stride, int) else case.stride
    return conv_problem(case.input, case.weight, None, stride, case.padding, (1, 1), 1)


def plan_for(case: Case, dtype: torch.dtype, tile: tuple[int, int] = (32, 16), **options) -> ConvPlan:
    """A plan of small tiles, so that small images have several."""
    block_k = power_of_two(window(problem_of(case), dtype.itemsize), 16)
    return ConvPlan(Variant.STEM, *tile, block_k, num_warps=4, num_stages=2, box=(2, 4, tile[0] // 8), **options)


def operands(case: Case, dtype: torch.dtype, device: torch.device, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """x and w."""
    N, C, H, W = case.input
    if layout == "every second pixel":
        x = torch.randn(N, C, H, 2 * W).to(device, dtype)[..., ::2]
    else:
        x = torch.randn(case.input).to(device, dtype)
    w = (torch.randn(case.weight) * 0.3).to(device, dtype)
    if layout == "channels_last":
        x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    return x, w


def convolve(
    case: Case,
    x,
    w,
    choice: ConvPlan,
    epilogue: Epilogue = Epilogue(),  # noqa: B008 - immutable
    bias=None,
    residual=None,
) -> tuple[torch.Tensor, Statistics | None]:
    """(y in channels_last, its statistics)."""
    p = problem_of(case)
    shape = p.N, p.K, p.P, p.Q
    strides = dense_strides(shape, channels_last=True)
    request = Request(p, Direction.FORWARD, x.stride(), w.stride(), strides, x.dtype, epilogue, device_spec(x.device))
    prepared = prepare(request, choice)
    y = torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)
    statistics = None
    if prepared.tiles:
        statistics = with_workspace(sums_and_deviations(p.K, x.device), p.K, x.device, *prepared.tiles)
    prepared.run(x, w, y, bias, residual, statistics, 0.1)
    return y, statistics


def truth(case: Case, *tensors: torch.Tensor | None, activation: str = "none") -> torch.Tensor:
    """In float64, of x, w, bias and residual."""
    doubles = [None if t is None else t.double().cpu() for t in (*tensors, None, None)[:4]]
    return reference(problem_of(case), *doubles, activation, 0.1)


def bound_of(case: Case, value: torch.Tensor, *tensors: torch.Tensor | None) -> torch.Tensor:
    x = tensors[0]
    absolute = truth(case, *(None if t is None else t.abs() for t in tensors))
    tf32 = uses_tf32(x.dtype, conv_precision(x.dtype))
    return sum_bound(value, absolute, case.input[1] * case.kernel[0] * case.kernel[1] + 2, x.dtype, tf32=tf32)


@pytest.mark.parametrize("dtype, layout", KINDS, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward(case, dtype, layout, device):
    x, w = operands(case, dtype, device, layout)
    actual, _ = convolve(case, x, w, plan_for(case, dtype, precision="tf32"))
    value = truth(case, x, w)
    assert_within(case.name, actual, value, bound_of(case, value, x, w))


@pytest.mark.parametrize("tile", [(16, 16), (64, 32), (128, 64)])
def test_other_tiles(tile, device):
    x, w = operands(RESNET, torch.float16, device, "NCHW")
    actual, _ = convolve(RESNET, x, w, plan_for(RESNET, torch.float16, tile))
    value = truth(RESNET, x, w)
    assert_within(str(tile), actual, value, bound_of(RESNET, value, x, w))


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
def test_epilogue(activation, device):
    x, w = operands(RESNET, torch.float16, device, "channels_last")
    bias = torch.randn(RESNET.outputs).to(x)
    residual = torch.randn(truth(RESNET, x, w).shape).to(x).contiguous(memory_format=torch.channels_last)
    choice = plan_for(RESNET, torch.float16)
    actual, _ = convolve(RESNET, x, w, choice, Epilogue(activation, residual=True), bias, residual)
    value = truth(RESNET, x, w, bias, residual, activation=activation)
    # The slope of silu reaches 1.1.
    assert_within(activation, actual, value, 1.1 * bound_of(RESNET, value, x, w, bias, residual))


def test_statistics(device):
    x, w = operands(RESNET, torch.float16, device, "channels_last")
    y, statistics = convolve(RESNET, x, w, plan_for(RESNET, torch.float16), Epilogue(statistics=True))
    total, deviations = statistics.sums, statistics.deviations
    values = y.double().cpu()
    squares = (values - values.mean((0, 2, 3), keepdim=True)).square().sum((0, 2, 3))
    eps = 6 * 2.0**-23 * (values[:, 0].numel()) ** 0.5
    assert_within("sum", total, values.sum((0, 2, 3)), eps * values.abs().sum((0, 2, 3)))
    assert_within("deviations", deviations, squares, 2 * eps * squares)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_its_windows_alone(case, value, device):
    """Not the neighbouring windows, though a window is read with a few elements of the next, against zeros of w."""
    x, w = operands(case, torch.float16, device, "NCHW")
    x[0, -1, x.shape[2] // 2, x.shape[3] // 2] = value
    actual, _ = convolve(case, x, w, plan_for(case, torch.float16))
    expected = truth(case, x, w)
    assert torch.equal(actual.cpu().isnan(), expected.isnan())
    assert torch.equal(actual.cpu().isinf(), expected.isinf())


def test_what_is_not_finite_in_a_filter_stays_in_its_channel(device):
    x, w = operands(RESNET, torch.float16, device, "NCHW")
    w[3, 1, 6, 6] = float("nan")
    actual, _ = convolve(RESNET, x, w, plan_for(RESNET, torch.float16))
    nan = actual.cpu().isnan()
    assert nan[:, 3].all() and not nan[:, :3].any() and not nan[:, 4:].any()


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_strides_of_windows(case, itemsize):
    """What the copy engine asks for: multiples of 16 bytes, each a multiple of the one before."""
    p = problem_of(case)
    image = packed(p, itemsize)
    row = image.cols * image.channels
    strides = [p.stride[1] * image.channels, row, p.stride[0] * row, image.rows * row]
    assert not any(stride * itemsize % 16 for stride in strides)
    assert not any(outer % inner for inner, outer in itertools.pairwise(strides))
    assert image.channels >= p.C
    assert image.rows >= (p.P - 1) * p.stride[0] + p.R and image.cols >= (p.Q - 1) * p.stride[1] + p.S


def test_candidates():
    def of(case: Case, device=H100, direction=Direction.FORWARD, **operands) -> list[ConvPlan]:
        return list(candidates(problem_of(case), direction, Operands(**{"dtype": "float16", **operands}), device))

    resnet = Case("ResNet-50", (32, 3, 224, 224), 64, (7, 7), stride=2, padding=3)
    found = of(resnet, first=Layout.NCHW, second=Layout.STRIDED)
    assert {(plan.block_m, plan.block_n) for plan in found} == {(256, 64), (128, 64), (64, 64)}
    assert all(plan.block_k == 32 and plan.box[0] * plan.box[1] * plan.box[2] == plan.block_m for plan in found)
    # 112 × 112 divide into boxes without rest.
    p = as_problem(resnet)
    assert tiles(p, Direction.FORWARD, found[0]) == [(32 * 112 * 112 // 256, 7)]
    assert packed(p, 2) == (32, 230, 230, 4)

    assert of(resnet, dtype="float32", precision="tf32") and of(resnet, dtype="float32", precision="tf32x3")
    assert not of(resnet, dtype="float32", precision="ieee")
    assert not of(resnet, device=A100)
    assert not of(resnet, output=Layout.NCHW)
    assert not of(resnet, direction=Direction.INPUT_GRAD)
    assert not of(Case("many channels", (1, 16, 9, 9), 16, (3, 3)))
    assert not of(Case("dilated", (1, 3, 9, 9), 16, (3, 3), dilation=2))
    assert not of(Case("groups", (1, 4, 9, 9), 16, (3, 3), groups=2))
    assert not of(Case("one row of taps", (1, 3, 9, 9), 16, (1, 3)))
