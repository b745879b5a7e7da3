"""The warp-specialised convolution: on a Hopper GPU, or its source on the model of :mod:`tests.ops.gluon_machine`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gpukern.conv import reference
from gpukern.conv.families.warp_specialized import launch
from gpukern.conv.families.warp_specialized.plan import candidates, tiles
from gpukern.conv.plan import ConvPlan, Direction, Layout, Operands, Variant
from gpukern.conv.planner import only_measured
from gpukern.conv.problem import conv_problem
from gpukern.conv.request import Epilogue, Request
from gpukern.ops._activation.properties import PROPERTIES
from gpukern.ops._activation.reference import activation as reference_activation
from gpukern.ops._reduction.functions import Statistics
from gpukern.ops._reduction.launch import sums_and_deviations, with_workspace
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.device import A100, B200, EMULATED, H100
from gpukern.runtime.strides import dense_strides
from tests.device import DEVICE
from tests.numerics import assert_within, sum_bound
from tests.ops.conv_cases import Case, as_problem
from tests.ops.gluon_machine import run_gluon

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(
        DEVICE.type == "cuda" and torch.cuda.get_device_capability() != (9, 0), reason="for Hopper alone"
    ),
]

CASES = (
    Case("3x3", (2, 32, 9, 7), 32, (3, 3), padding=1),
    Case("ragged 40 to 72", (3, 40, 6, 5), 72, (3, 3), padding=1),
    Case("1x1", (2, 64, 5, 7), 40, (1, 1)),
    Case("1x1 padded", (1, 32, 4, 4), 32, (1, 1), padding=1),
    Case("3x5 lopsided", (2, 32, 9, 10), 32, (3, 5), padding=(2, 0, 1, 3)),
    Case("2x2", (1, 48, 6, 6), 32, (2, 2)),
    Case("1x7", (2, 32, 4, 12), 32, (1, 7), padding=(0, 0, 3, 3)),
    Case("dilation 2", (1, 32, 9, 9), 32, (3, 3), padding=2, dilation=2),
    Case("dilation 3 by 1", (1, 32, 10, 9), 40, (2, 3), padding=(1, 1, 0, 0), dilation=(3, 1)),
    Case("padding beyond the kernel", (1, 32, 4, 4), 32, (2, 2), padding=5),
    Case("one pixel out", (1, 32, 3, 3), 32, (3, 3)),
    Case("1x1 image", (5, 32, 1, 1), 32, (3, 3), padding=1),
)
MAIN = CASES[0]
PLAN = ConvPlan(Variant.WARP_SPECIALIZED, 64, 16, 32, num_warps=4, num_stages=3, box=(1, 8, 8))


@pytest.fixture(autouse=True)
def machine(monkeypatch) -> list[int]:
    """Where there is no GPU, launches go to the model; the seed of its order of events can be set."""
    seed = [0]
    if DEVICE.type != "cuda":
        monkeypatch.setattr(
            launch,
            "launch",
            lambda kernel, grid, device, arguments, options: run_gluon(kernel, grid, arguments, options, seed[0]),
        )
    return seed


def problem_of(case: Case):
    if isinstance(case.padding, int):
        return as_problem(case)
    dilation = (case.dilation, case.dilation) if isinstance(case.dilation, int) else case.dilation
    return conv_problem(case.input, case.weight, None, (1, 1), case.padding, dilation, 1)


def make(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(shape).to(device, dtype).contiguous(memory_format=torch.channels_last)


def run(
    case: Case,
    first: torch.Tensor,
    second: torch.Tensor,
    choice: ConvPlan = PLAN,
    epilogue: Epilogue = Epilogue(),  # noqa: B008 - immutable
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    direction: Direction = Direction.FORWARD,
    programs: int = 2,
) -> tuple[torch.Tensor, Statistics | None]:
    """(the output in channels_last, its statistics)."""
    p = problem_of(case)
    shape = (p.N, p.K, p.P, p.Q) if direction is Direction.FORWARD else case.input
    strides = dense_strides(shape, channels_last=True)
    # Of few multiprocessors each takes several tiles.
    spec = replace(device_spec(first.device), sm_count=programs)
    request = Request(p, direction, first.stride(), second.stride(), strides, first.dtype, epilogue, spec)
    prepared = launch.prepare(request, choice)
    output = torch.empty_strided(shape, strides, dtype=first.dtype, device=first.device)
    statistics = None
    if prepared.tiles:
        statistics = with_workspace(sums_and_deviations(p.K, first.device), p.K, first.device, *prepared.tiles)
    prepared.run(first, second, output, bias, residual, statistics, 0.1)
    return output, statistics


def truth(case: Case, x, w, bias=None, residual=None) -> torch.Tensor:
    doubles = [None if t is None else t.double().cpu() for t in (x, w, bias, residual)]
    return reference.conv2d(problem_of(case), *doubles, "none", 0.0)


def check(case: Case, actual, x, w, bias=None, residual=None) -> None:
    value = truth(case, x, w, bias, residual)
    absolute = truth(case, *(None if t is None else t.abs() for t in (x, w, bias, residual)))
    terms = case.input[1] * case.kernel[0] * case.kernel[1] + 2
    assert_within(case.name, actual, value, sum_bound(value, absolute, terms, x.dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward(case, dtype, device):
    x, w = make(case.input, device, dtype), make(case.weight, device, dtype)
    check(case, run(case, x, w)[0], x, w)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_input_gradient(case, device):
    p = problem_of(case)
    w, dy = make(case.weight, device), make((p.N, p.K, p.P, p.Q), device)
    actual, _ = run(case, dy, w, direction=Direction.INPUT_GRAD)
    value, absolute = (
        reference.conv2d_input_grad(p, *tensors, False)
        for tensors in ((dy.double().cpu(), w.double().cpu()), (dy.double().cpu().abs(), w.double().cpu().abs()))
    )
    assert_within(case.name, actual, value, sum_bound(value, absolute, p.K * p.R * p.S, dy.dtype))


@pytest.mark.parametrize("box", [(1, 8, 8), (4, 4, 4), (64, 1, 1), (1, 2, 32), (1, 8, 16)])
@pytest.mark.parametrize("block_n, block_k", [(16, 16), (64, 64)])
def test_tiles(box, block_n, block_k, device):
    choice = replace(PLAN, block_m=box[0] * box[1] * box[2], block_n=block_n, block_k=block_k, box=box)
    x, w = make(MAIN.input, device), make(MAIN.weight, device)
    check(MAIN, run(MAIN, x, w, choice)[0], x, w)


# Rounds through the ring that come out even or not; tiles of fewer steps than there are buffers; one tile or several a
# program, more programs than tiles.
@pytest.mark.parametrize("programs", [1, 3, 200])
@pytest.mark.parametrize("buffers", [2, 3, 6])
@pytest.mark.parametrize("kernel", [(1, 1), (1, 2), (1, 3), (3, 3)])
def test_barriers(kernel, buffers, programs, device, machine):
    case = Case("barriers", (2, 32, 9, 10), 32, kernel)
    x, w = make(case.input, device), make(case.weight, device)
    residual = make(truth(case, x, w).shape, device)
    for machine[0] in range(2):
        for added in (None, residual):
            epilogue = Epilogue(residual=added is not None)
            choice = replace(PLAN, num_stages=buffers)
            check(case, run(case, x, w, choice, epilogue, None, added, programs=programs)[0], x, w, None, added)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="hangs there")
def test_the_model_finds_a_deadlock(device):
    """A buffer is given back when the next one is in use: with one alone both sides wait."""
    x, w = make(MAIN.input, device), make(MAIN.weight, device)
    with pytest.raises(RuntimeError, match="deadlock"):
        run(MAIN, x, w, replace(PLAN, num_stages=1))


def test_crop(device):
    """A view of channels_last whose rows do not follow one another."""
    x, w = make((2, 40, 12, 9), device)[:, 8:, 2:11, :7], make(MAIN.weight, device)
    check(MAIN, run(MAIN, x, w)[0], x, w)


@pytest.mark.parametrize("name", ["none", *PROPERTIES])
def test_epilogue(name, device):
    """Bias, residual and activation are added to the fp32 sum: one rounding."""
    case = CASES[1]
    x, w, bias = make(case.input, device), make(case.weight, device), torch.randn(case.outputs).half().to(device)
    residual = make(truth(case, x, w).shape, device)
    actual, _ = run(case, x, w, PLAN, Epilogue(name, residual=True), bias, residual)
    value = reference_activation(truth(case, x, w, bias, residual), name, 0.1)
    absolute = truth(case, x.abs(), w.abs(), bias.abs(), residual.abs())
    # The steepest activation is hardswish, with a slope of 1.5.
    assert_within(name, actual, value, 1.5 * sum_bound(value, absolute, case.input[1] * 9 + 2, x.dtype))


@pytest.mark.parametrize("with_residual", [False, True])
def test_statistics(with_residual, device):
    case = CASES[1]
    x, w = make(case.input, device), make(case.weight, device)
    residual = make(truth(case, x, w).shape, device) if with_residual else None
    y, statistics = run(case, x, w, PLAN, Epilogue("relu", with_residual, statistics=True), None, residual)
    total, deviations = statistics.sums, statistics.deviations
    values = y.double().cpu()
    assert values.isfinite().all()
    squares = (values - values.mean((0, 2, 3), keepdim=True)).square().sum((0, 2, 3))
    # fp32 additions in any order, as in tests/numerics.py; the mean errs by eps of itself.
    eps = 6 * 2.0**-23 * values[:, 0].numel() ** 0.5
    assert_within("sum", total, values.sum((0, 2, 3)), eps * values.abs().sum((0, 2, 3)))
    assert_within("deviations", deviations, squares, eps * (squares + values.square().sum((0, 2, 3))))


def test_nan_and_infinity_come_through(device):
    x, w = make(MAIN.input, device), make(MAIN.weight, device)
    x[0, 3, 4, 2], x[1, 31, 8, 6] = float("nan"), float("inf")
    actual = run(MAIN, x, w, PLAN, Epilogue("relu"))[0].cpu()
    expected = truth(MAIN, x, w).relu()
    assert torch.equal(actual.isnan(), expected.isnan()) and torch.equal(actual.isinf(), expected.isinf())


def test_candidates():
    def of(case: Case, direction=Direction.FORWARD, device=H100, **operands) -> list[ConvPlan]:
        return list(candidates(as_problem(case), direction, Operands(**{"dtype": "bfloat16", **operands}), device))

    layer = Case("ResNet-50", (32, 256, 14, 14), 256, (3, 3), padding=1)
    found = of(layer)
    assert {(plan.block_m, plan.block_n) for plan in found} >= {(256, 128), (128, 256), (128, 128)}
    assert all(map(only_measured, found)), "nothing but a GPU can show that they are right"
    for plan in found:
        assert plan.box[0] * plan.box[1] * plan.box[2] == plan.block_m and plan.num_stages >= 3
        shared = 2 * plan.num_stages * plan.block_k * (plan.block_m + plan.block_n) + 2 * plan.block_m * plan.block_n
        assert shared < H100.shared_memory
    # 32 · 14 · 14 pixels divide into boxes of 32 × 2 × 2; 9 taps of 4 blocks of channels.
    assert (128, 128, 64) in {(plan.block_m, plan.block_n, plan.block_k) for plan in found}
    of_128 = next(plan for plan in found if (plan.block_m, plan.block_n) == (128, 128))
    assert tiles(as_problem(layer), Direction.FORWARD, of_128) == [(32 * 14 * 14 // 128 * 2, 36)]
    assert of(layer, Direction.INPUT_GRAD)

    few = of(Case("few channels", (32, 64, 56, 56), 64, (3, 3), padding=1))
    assert {plan.block_n for plan in few} == {64}
    assert of(Case("96 channels", (8, 96, 28, 28), 96, (3, 3)))[0].block_k == 32
    assert not of(layer, Direction.WEIGHT_GRAD)
    assert not of(layer, device=A100) and not of(layer, device=B200)
    assert not of(layer, dtype="float32", precision="tf32")
    assert not of(layer, first=Layout.NCHW) and not of(layer, output=Layout.CHANNELS)
    assert not of(replace(layer, stride=2)) and not of(replace(layer, groups=4))
    assert of(layer, device=EMULATED), "plans of emulated kernels are those of Hopper"
