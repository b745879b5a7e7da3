"""Weight and bias gradients whose sums splits share: one launch, the same bits whichever program comes last."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from gpukern.conv import launch as conv_launch
from gpukern.conv import prepare, reference
from gpukern.conv.plan import ConvPlan, Direction, Variant
from gpukern.conv.problem import ConvProblem
from gpukern.ops._reduction import launch, splits
from gpukern.runtime.counters import zeroed_counters
from gpukern.runtime.mode import EMULATE
from tests.numerics import assert_within, sum_bound, uses_tf32
from tests.ops.conv_cases import Case, as_problem

pytestmark = pytest.mark.usefixtures("poisoned")

#: A plan with a tile smaller than its own for each kernel, and a layer that fills no tile: name, layer, plan, layout.
KERNELS = (
    (Case("taps", (3, 20, 5, 4), 36, (2, 1), padding=1), ConvPlan(Variant.TAPS, 32, 16, 16, 4, 2), "channels_last"),
    (Case("taps", (3, 20, 5, 7), 20, (1, 2), stride=2), ConvPlan(Variant.TAPS, 16, 32, 16, 4, 2), "NCHW"),
    (Case("taps of groups", (3, 34, 5, 4), 36, (1, 1), groups=2), ConvPlan(Variant.TAPS, 32, 16, 16, 4, 2), "NCHW"),
    (Case("flat", (3, 3, 6, 5), 20, (3, 2), padding=1), ConvPlan(Variant.FLAT, 16, 16, 16, 4, 2), "channels_last"),
    (Case("flat", (3, 3, 6, 5), 20, (3, 2), padding=1), ConvPlan(Variant.FLAT, 32, 16, 16, 4, 2), "NCHW"),
    (Case("direct", (3, 6, 6, 5), 18, (2, 2), groups=6), ConvPlan(Variant.DIRECT, 16, 1, 16, 4, 1), "channels_last"),
    (Case("direct", (3, 12, 4, 5), 12, (2, 1), groups=6), ConvPlan(Variant.DIRECT, 16, 1, 16, 4, 1), "NCHW"),
    (Case("gemm", (3, 24, 6, 7), 40, (1, 1)), ConvPlan(Variant.GEMM, 32, 16, 16, 4, 2), "channels_last"),
    (Case("gemm", (5, 24, 4, 4), 40, (1, 1)), ConvPlan(Variant.GEMM, 32, 16, 16, 4, 2, box=(1, 1, 16)), "NCHW images"),
    (Case("box", (20, 24, 3, 2), 40, (2, 1)), ConvPlan(Variant.BATCH_BOX, 32, 16, 16, 4, 2), "channels_last"),
    (
        Case("three taps", (20, 24, 3, 3), 40, (1, 3), padding=(0, 1)),
        ConvPlan(Variant.BATCH_BOX, 32, 3 * 16, 16, 4, 2),
        "channels_last",
    ),
    (
        Case("depthwise", (3, 12, 9, 8), 24, (3, 3), padding=1, groups=12),
        ConvPlan(Variant.DEPTHWISE, 16, 1, 16, 4, 1, box=(8, 3, 2)),
        "channels_last",
    ),
    (
        Case("depthwise", (3, 6, 9, 8), 6, (5, 3), padding=1, groups=6),
        ConvPlan(Variant.DEPTHWISE, 4, 1, 16, 4, 1, box=(8, 3, 2)),
        "NCHW",
    ),
)
NAMES = [f"{case.name}, {layout}" for case, _, layout in KERNELS]
kernels = pytest.mark.parametrize("case, plan, layout", KERNELS, ids=NAMES)


@pytest.fixture(params=[None, 0], ids=["one round", "two rounds"])
def rounds(request, monkeypatch) -> Iterator[int]:
    """How often parts are added: with tiles this small twice only where a round takes no time."""
    if request.param is not None:
        monkeypatch.setattr(splits, "_ROUND", request.param)
    prepare.forget()
    yield 1 if request.param is None else 2
    prepare.forget()


def operands(case: Case, layout: str, dtype: torch.dtype, device: torch.device) -> tuple:
    """The problem, dy and x."""
    p = as_problem(case)
    order = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    made = (torch.randn(shape).to(device, dtype) for shape in ((p.N, p.K, p.P, p.Q), case.input))
    return p, *(tensor.contiguous(memory_format=order) for tensor in made)


def weight_grad(p: ConvProblem, dy: torch.Tensor, x: torch.Tensor, plan: ConvPlan, layout: str) -> torch.Tensor:
    last = layout != "NCHW"  # of NCHW images too, matrix products write channels_last filters
    return conv_launch.run(conv_launch.prepared_for(p, Direction.WEIGHT_GRAD, dy, x, last, plan=plan), dy, x)[0]


def check(p: ConvProblem, dy: torch.Tensor, x: torch.Tensor, plan: ConvPlan, layout: str) -> torch.Tensor:
    actual = weight_grad(p, dy, x, plan, layout)
    exact = [t.double().cpu() for t in (dy, x)]
    value = reference.conv2d_weight_grad(p, *exact, False)
    absolute = reference.conv2d_weight_grad(p, *(t.abs() for t in exact), False)
    tf32 = uses_tf32(dy.dtype, plan.precision)
    assert_within(str(plan), actual, value, sum_bound(value, absolute, p.N * p.P * p.Q, dy.dtype, tf32=tf32))
    return actual


@pytest.mark.parametrize("count", [2, 7])
@kernels
def test_splits_of_every_kernel_are_added(case, plan, layout, count, rounds, device, monkeypatch):
    """Also where the last group is not full, or parts are zero. Twice the same bits: counters are zero again."""
    given = []
    wrapped = lambda count, device: given.append(zeroed_counters(count, device)) or given[-1]  # noqa: E731
    monkeypatch.setattr(launch, "zeroed_counters", wrapped)
    p, dy, x = operands(case, layout, torch.float16, device)
    shared = replace(plan, splits=count)
    assert torch.equal(check(p, dy, x, shared, layout), weight_grad(p, dy, x, shared, layout))
    assert len(given) == 2 and not any(each.any() for each in given)
    assert splits.fan_in(7, 16 * 16) == (None if rounds == 1 else 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@kernels
def test_sums_of_other_dtypes_are_rounded_once(case, plan, layout, dtype, device):
    p, dy, x = operands(case, layout, dtype, device)
    precision = "tf32" if dtype is torch.float32 and plan.block_n > 1 else "ieee"
    check(p, dy, x, replace(plan, splits=3, precision=precision), layout)


@pytest.mark.skipif(not EMULATE, reason="a GPU takes its programs in an order of its own")
@kernels
def test_the_order_of_programs_changes_no_bit(case, plan, layout, rounds, device, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder

    p, dy, x = operands(case, layout, torch.float32, device)
    shared = replace(plan, splits=7, precision="tf32" if plan.block_n > 1 else "ieee")
    first, given = weight_grad(p, dy, x, shared, layout), type(interpreter_builder).set_grid_idx

    def other_way_round(self, *place):
        """Backwards from the second; then the last split is one whose part is not zero."""
        given(self, *((1 - i) % size for i, size in zip(place, self.grid_dim, strict=True)))

    monkeypatch.setattr(type(interpreter_builder), "set_grid_idx", other_way_round)
    assert torch.equal(weight_grad(p, dy, x, shared, layout), first)


@kernels
def test_only_the_last_program_writes(case, plan, layout, rounds, device, monkeypatch):
    """With counters that nobody brings to the last one, what was there before stays."""
    monkeypatch.setattr(launch, "zeroed_counters", lambda count, device: torch.full((count,), 99).int().to(device))
    p, dy, x = operands(case, layout, torch.float16, device)
    assert weight_grad(p, dy, x, replace(plan, splits=7), layout).isnan().all()


@kernels
def test_what_is_not_finite_stays_where_it_is(case, plan, layout, device):
    p, dy, x = operands(case, layout, torch.float16, device)
    x[0, 0, 1, 1], dy[-1, -1, 1, 0] = float("nan"), float("inf")
    actual = weight_grad(p, dy, x, replace(plan, splits=3), layout).cpu()
    value = reference.conv2d_weight_grad(p, dy.double().cpu(), x.double().cpu(), False)
    assert torch.equal(actual.isnan(), value.isnan()) and torch.equal(actual.isinf(), value.isinf())


@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_bias_gradient_of_splits(dtype, order, device, monkeypatch):
    monkeypatch.setattr(launch, "channel_sum_splits", lambda pixels, channels, device: 37)
    grad = torch.randn(5, 70, 11, 12).to(device, dtype).contiguous(memory_format=order)
    first, second = launch.channel_sum(grad), launch.channel_sum(grad)
    value, absolute = (t.double().cpu().sum((0, 2, 3)) for t in (grad, grad.abs()))
    assert_within("bias gradient", first, value, sum_bound(value, absolute, 5 * 11 * 12, dtype, tf32=False))
    assert torch.equal(first, second)


# ---- how parts are added -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 64, 576, 4096, 8192, 16384, 49152])
def test_groups_hold_all_splits_and_take_fewer_steps(size):
    for count in range(1, 300):
        group, number = splits.fan_in(count, size), splits.group_count(count, size)
        steps = splits.parts_in_turn(count, size)
        if group is None:
            assert (number, steps) == (0, count)
        else:
            assert (number - 1) * group < count <= number * group and number > 1 and steps == group + number < count


def test_two_rounds_are_for_many_parts_or_large_ones():
    assert splits.fan_in(16, 64 * 64) is None and splits.fan_in(132, 64 * 64) == 12
    assert splits.fan_in(7, 128 * 128) is None and splits.fan_in(16, 128 * 128) == 4
    # A bias gradient's never are.
    assert all(splits.fan_in(count, 64) is None for count in range(1, 513))


RECORD = """
import json, sys
import torch
import gpukern.functional as F
from gpukern.runtime import device
from gpukern.runtime.compile_only import record_launches

counts = {}
with record_launches(getattr(device, sys.argv[1])) as launches:
    for name, shape, filter, geometry in json.loads(sys.argv[2]):
        x = torch.empty(shape, device="meta").half().contiguous(memory_format=torch.channels_last)
        w = torch.empty(filter, device="meta").half().contiguous(memory_format=torch.channels_last).requires_grad_()
        b = torch.empty(filter[0], device="meta").half().requires_grad_()
        y = F.conv2d(x, w, b, **geometry)
        launches.clear()
        y.backward(torch.empty_like(y))
        counts[name] = [launch.kernel for launch in launches], max(launch.grid[-1] for launch in launches)
print(json.dumps(counts))
"""
LAYERS = (
    ("1x1", (32, 64, 56, 56), (64, 64, 1, 1), {}),
    ("3x3", (32, 128, 28, 28), (128, 128, 3, 3), {"padding": 1}),
    ("first", (32, 3, 224, 224), (64, 3, 7, 7), {"stride": 2, "padding": 3}),
    ("depthwise", (32, 96, 56, 56), (96, 1, 3, 3), {"padding": 1, "groups": 96}),
    ("few channels", (32, 64, 28, 28), (64, 2, 3, 3), {"padding": 1, "groups": 32}),
)


@pytest.mark.parametrize("device_name", ["A100", "H100"])
def test_a_weight_gradient_is_one_launch_and_so_is_a_bias_gradient(device_name, run_python):
    result = run_python(RECORD, device_name, json.dumps(LAYERS), GPUKERN_PLANS="")
    assert result.returncode == 0, result.stderr
    for name, (names, most) in json.loads(result.stdout).items():
        assert len(names) == 2 and "channel_sum_kernel" in names, (name, names)
        assert most > 16, f"{name}: no sum was split"
