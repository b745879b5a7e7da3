"""Every kernel variant, forced through its plan, against float64: whatever plans choose, each must be right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gpukern.conv import launch
from gpukern.conv.families.registry import FAMILIES
from gpukern.conv.plan import ConvPlan, Direction, Operands, Variant
from gpukern.conv.planner import candidates, only_measured
from gpukern.conv.problem import ConvProblem
from gpukern.conv.request import Epilogue, operands_of, shapes
from gpukern.ops._activation.properties import PROPERTIES
from gpukern.ops._activation.reference import activation as reference_activation
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.device import EMULATED, H100, DeviceSpec
from gpukern.runtime.precision import conv_precision
from tests.numerics import assert_within, sum_bound, uses_tf32
from tests.ops.conv_cases import CASES, Case, as_problem

pytestmark = pytest.mark.usefixtures("poisoned")

#: Few multiprocessors as in :data:`EMULATED`, no copy engine.
AMPERE = DeviceSpec("emulated Ampere", (8, 0), EMULATED.sm_count, 163 * 1024)
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
EMULATABLE = [variant for family in FAMILIES if family.emulated for variant in family.variants]


def plans(p: ConvProblem, direction: Direction, operands: Operands, device: torch.device) -> dict[Variant, ConvPlan]:
    """One plan of each variant that can: the candidate with the smallest tile, and of these the most splits."""
    found: dict[Variant, ConvPlan] = {}
    for spec in (device_spec(device), *(() if device.type == "cuda" else (AMPERE,))):
        for plan in candidates(p, direction, operands, spec):
            if only_measured(plan):
                continue
            best = found.setdefault(plan.variant, plan)
            if (plan.block_m * plan.block_n, -plan.splits) < (best.block_m * best.block_n, -best.splits):
                found[plan.variant] = plan
    return found


def tensors(case: Case, dtype: torch.dtype, device: torch.device, layout: str) -> tuple[torch.Tensor, ...]:
    """x, w, dy, bias, residual."""
    p = as_problem(case)
    made = (
        torch.randn(shape).to(device, dtype).contiguous(memory_format=FORMATS[layout])
        for shape in ((p.N, p.C, p.H, p.W), (p.K, p.group_inputs, p.R, p.S), (p.N, p.K, p.P, p.Q))
    )
    x, w, dy = made
    residual = torch.randn(dy.shape).to(dy).contiguous(memory_format=FORMATS[layout])
    return x, w * 0.3, dy, torch.randn(p.K).to(dy), residual


def truth(p: ConvProblem, direction: Direction, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    from gpukern.conv import reference

    if direction is Direction.FORWARD:
        return reference.conv2d(p, first, second, None, None, "none", 0.0)
    if direction is Direction.INPUT_GRAD:
        return reference.conv2d_input_grad(p, first, second, False)
    return reference.conv2d_weight_grad(p, first, second, False)


def terms(p: ConvProblem, direction: Direction) -> int:
    taps = p.R * p.S
    return {
        Direction.FORWARD: p.group_inputs * taps,
        Direction.INPUT_GRAD: p.group_outputs * taps,
        Direction.WEIGHT_GRAD: p.N * p.P * p.Q,
    }[direction]


#: More channels than the other cases, for kernels that ask for multiples of 16 bytes.
LARGER = (
    Case("3x3 136 to 40", (3, 136, 7, 5), 40, (3, 3), padding=1),
    Case("3x3 64 to 72, batch of 40", (40, 64, 3, 2), 72, (3, 3), padding=1),
    Case("1x1 72 to 136", (3, 72, 7, 9), 136, (1, 1)),
    Case("stride 2, even", (3, 40, 10, 12), 24, (3, 3), stride=2, padding=1),
    Case("stride 2, even, dilated", (2, 24, 12, 10), 16, (3, 2), stride=2, padding=2, dilation=(1, 2)),
    Case("stem of MobileNet", (2, 3, 18, 22), 24, (3, 3), stride=2, padding=1),
    Case("depthwise 5x5", (2, 48, 9, 11), 48, (5, 5), padding=2, groups=48),
    Case("ResNeXt", (2, 64, 7, 6), 64, (3, 3), padding=1, groups=16),
    Case("groups of 8, stride 2", (1, 64, 9, 10), 64, (3, 3), stride=2, padding=1, groups=8),
    Case("groups of 2, odd number of them", (1, 40, 5, 5), 40, (3, 3), padding=1, groups=20),
    Case("groups of 4 to 8, lopsided", (1, 48, 7, 5), 96, (2, 4), padding="same", groups=12),
    Case("groups of 8 to 2, stride 3 by 1", (1, 64, 8, 6), 16, (3, 3), stride=(3, 1), padding=1, groups=8),
    Case("groups of 16, dilation 2 by 3", (1, 64, 7, 8), 64, (3, 3), padding=(2, 3), dilation=(2, 3), groups=4),
    Case("groups of 16 to 4, stride 2, dilation 2", (1, 64, 9, 8), 16, (3, 3), 2, 2, 2, groups=4),
    Case("groups of 4, stride beyond the kernel", (2, 32, 5, 6), 32, (1, 1), stride=(3, 2), groups=8),
)
KINDS = (
    (torch.float16, "channels_last"),
    (torch.bfloat16, "channels_last"),
    (torch.float32, "channels_last"),
    (torch.float16, "NCHW"),
)
_ALL = [case for case in (*CASES, *LARGER) if case.input[0]]


@pytest.mark.parametrize("dtype, layout", KINDS, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("case", _ALL, ids=lambda case: case.name)
def test_every_variant(case, dtype, layout, device):
    p = as_problem(case)
    x, w, dy, _, _ = tensors(case, dtype, device, layout)
    precision = conv_precision(dtype)
    for direction, (first, second) in zip(Direction, ((x, w), (dy, w), (dy, x)), strict=True):
        output = torch.empty(shapes(p, direction)[2]).contiguous(memory_format=FORMATS[layout])
        strides = first.stride(), second.stride(), output.stride()
        operands = operands_of(p, direction, strides, True, dtype, precision)
        value = truth(p, direction, *(t.double().cpu() for t in (first, second)))
        absolute = truth(p, direction, *(t.double().cpu().abs() for t in (first, second)))
        tf32 = uses_tf32(dtype, precision)
        bound = sum_bound(value, absolute, terms(p, direction), dtype, tf32=tf32)
        for plan in plans(p, direction, operands, device).values():
            prepared = launch.prepared_for(p, direction, first, second, layout == "channels_last", plan=plan)
            actual, _ = launch.run(prepared, first, second)
            assert_within(f"{case.name}, {direction.value}, {plan}", actual, value, bound)
            assert actual.is_contiguous(memory_format=FORMATS[layout])


def _by_variant(direction: Direction) -> list[tuple[Variant, Case, ConvPlan]]:
    """For each variant the first case that it can compute."""
    found: dict[Variant, tuple[Variant, Case, ConvPlan]] = {}
    for case in (*LARGER, *_ALL):
        p = as_problem(case)
        for variant, plan in plans(p, direction, Operands("float16"), torch.device("cpu")).items():
            found.setdefault(variant, (variant, case, plan))
    return list(found.values())


FORWARD = _by_variant(Direction.FORWARD)


def test_every_variant_is_tested():
    backward_only = {Variant.BATCH_BOX}
    assert {variant for variant, _, _ in FORWARD} == set(EMULATABLE) - backward_only


@pytest.mark.parametrize("name", ["none", *PROPERTIES])
@pytest.mark.parametrize("variant, case, plan", FORWARD, ids=lambda value: getattr(value, "value", ""))
def test_epilogue(variant, case, plan, name, device):
    """Bias, residual and activation are added to the fp32 sum: one rounding."""
    p = as_problem(case)
    x, w, _, bias, residual = tensors(case, torch.float16, device, "channels_last")
    epilogue = Epilogue(name, residual=True)
    prepared = launch.prepared_for(p, Direction.FORWARD, x, w, True, epilogue, plan)
    actual, _ = launch.run(prepared, x, w, bias, residual, 0.1)
    plain = truth(p, Direction.FORWARD, x.double().cpu(), w.double().cpu())
    value = plain + bias.double().cpu()[:, None, None] + residual.double().cpu()
    absolute = truth(p, Direction.FORWARD, x.double().cpu().abs(), w.double().cpu().abs())
    absolute += bias.double().cpu().abs()[:, None, None] + residual.double().cpu().abs()
    value = reference_activation(value, name, 0.1)
    # No activation but these is steeper than 1: gelu's and silu's slopes reach 1.13, hardswish's 1.5.
    bound = 1.5 * sum_bound(value, absolute, terms(p, Direction.FORWARD) + 2, torch.float16)
    assert_within(f"{plan}, {name}", actual, value, bound)


@pytest.mark.parametrize(
    "variant, case, plan", _by_variant(Direction.INPUT_GRAD), ids=lambda value: getattr(value, "value", "")
)
def test_epilogue_of_a_transposed_convolution(variant, case, plan, device):
    """The input gradient as an operation of its own, with a bias in fp32 as folding leaves it."""
    p = as_problem(case)
    x, w, dy, _, _ = tensors(case, torch.float16, device, "channels_last")
    bias, residual = torch.randn(p.C, device=device), torch.randn_like(x)
    prepared = launch.prepared_for(p, Direction.INPUT_GRAD, dy, w, True, Epilogue("silu", residual=True), plan)
    actual, _ = launch.run(prepared, dy, w, bias, residual)
    value = truth(p, Direction.INPUT_GRAD, dy.double().cpu(), w.double().cpu())
    value += bias.double().cpu()[:, None, None] + residual.double().cpu()
    absolute = truth(p, Direction.INPUT_GRAD, dy.double().cpu().abs(), w.double().cpu().abs())
    absolute += bias.double().cpu().abs()[:, None, None] + residual.double().cpu().abs()
    # silu's slope reaches 1.1.
    bound = 1.1 * sum_bound(value, absolute, terms(p, Direction.INPUT_GRAD) + 2, torch.float16)
    assert_within(str(plan), actual, reference_activation(value, "silu", 0.0), bound)


@pytest.mark.parametrize("variant, case, plan", FORWARD, ids=lambda value: getattr(value, "value", ""))
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_statistics(variant, case, plan, offset, device):
    """Of the output as stored, the deviations exact to fp32 even where the mean is large beside them."""
    p = as_problem(case)
    x, w, _, bias, _ = tensors(case, torch.float32, device, "channels_last")
    x, w, bias = x.half(), w.half(), (bias + offset).half()
    prepared = launch.prepared_for(p, Direction.FORWARD, x, w, True, Epilogue(statistics=True), plan)
    y, statistics = launch.run(prepared, x, w, bias)
    total, deviations = statistics.sums, statistics.deviations
    values = y.double().cpu()
    mean = values.mean((0, 2, 3), keepdim=True)
    pixels = p.N * p.P * p.Q
    # fp32 additions in any order: each at most 2⁻²⁴ of a partial sum, as in tests/numerics.py.
    eps = 6 * 2.0**-23 * pixels**0.5
    assert_within("sum", total, values.sum((0, 2, 3)), eps * values.abs().sum((0, 2, 3)))
    # The mean errs by eps of itself, which enters the deviations squared and times the pixels.
    squares = (values - mean).square().sum((0, 2, 3))
    off = pixels * (eps * values.abs().mean((0, 2, 3))).square()
    bound = eps * squares + off + 2 * (off * squares).sqrt() + 1e-30
    assert_within("deviations", deviations, squares, bound)


@pytest.mark.parametrize("variant, case, plan", FORWARD, ids=lambda value: getattr(value, "value", ""))
def test_nan_and_infinity_come_through(variant, case, plan, device):
    p = as_problem(case)
    x, w, _, _, _ = tensors(case, torch.float16, device, "channels_last")
    x[0, 0, 0, 0], x[-1, -1, -1, -1] = float("nan"), float("inf")
    prepared = launch.prepared_for(p, Direction.FORWARD, x, w, True, Epilogue("relu"), plan)
    actual, _ = launch.run(prepared, x, w)
    value = truth(p, Direction.FORWARD, x.double().cpu(), w.double().cpu()).relu()
    assert torch.equal(actual.cpu().isnan(), value.isnan())
    assert torch.equal(actual.cpu().isinf(), value.isinf())


def test_splits_give_the_same_bits_every_time(device):
    """Whichever program comes last, partial sums are added in the order of the splits; counters are left at zero."""
    case = Case("small grid", (1, 64, 5, 5), 32, (3, 3), padding=1)
    p = as_problem(case)
    x, w, _, bias, _ = tensors(case, torch.float16, device, "channels_last")
    plan = replace(plans(p, Direction.FORWARD, Operands("float16"), device)[Variant.TAPS], splits=4)
    prepared = launch.prepared_for(p, Direction.FORWARD, x, w, True, plan=plan)
    first, *others = (launch.run(prepared, x, w, bias)[0] for _ in range(3))
    assert all(torch.equal(first, other) for other in others)


def test_a_split_plan_is_chosen_for_small_grids():
    case = Case("ResNet-50, batch 1", (1, 512, 7, 7), 512, (3, 3), padding=1)
    assert any(plan.splits > 1 for plan in candidates(as_problem(case), Direction.FORWARD, Operands("float16"), H100))
