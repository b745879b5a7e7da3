"""An input gradient that ends in the sums of a batch norm's backward: against float64 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from gpukern.conv import exclusions, forget, reference
from gpukern.conv import launch as conv_launch
from gpukern.conv.families.registry import FAMILIES, family_of
from gpukern.conv.hooks import force_plan
from gpukern.conv.plan import ConvPlan, Direction, Operands, Variant
from gpukern.conv.planner import candidates, heuristic_plan, norm_grad_plan, only_measured, ranking
from gpukern.conv.request import operands_of
from gpukern.ops._activation.functions import needs_input
from gpukern.ops._activation.properties import PROPERTIES
from gpukern.ops._batch_norm.reference import inner_gradient
from gpukern.ops._conv_norm_grad import launch as conv_norm_launch
from gpukern.ops.activation import ACTIVATIONS
from gpukern.ops.conv_norm_grad import conv2d_input_grad_norm
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.device import H100
from gpukern.runtime.precision import conv_precision
from gpukern.runtime.refusal import DescriptorRefused
from tests.numerics import FP32_EPS, assert_within, rounding_bound, sum_bound, uses_tf32
from tests.ops.conv_cases import Case, as_problem
from tests.ops.test_conv2d_forced import AMPERE

pytestmark = pytest.mark.usefixtures("poisoned")

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS, SLOPE = 1e-3, 0.1


class Call(NamedTuple):
    """The operands of one call."""

    case: Case
    grad: torch.Tensor
    weight: torch.Tensor
    channels_last: bool
    added: torch.Tensor | None
    z: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor
    norm_weight: torch.Tensor | None
    norm_bias: torch.Tensor | None
    other: torch.Tensor | None
    activation: str

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        p = as_problem(self.case)
        return conv2d_input_grad_norm(
            self.grad, self.weight, self.case.input, self.channels_last, p.stride, p.padding, p.dilation, p.groups,
            *self[4:11], EPS, self.activation, SLOPE,
        )  # fmt: skip


def make(
    case: Case,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    layout: str = "channels_last",
    activation: str = "relu",
    *,
    residual: bool = False,
    added: bool = True,
    parameters: bool = True,
) -> Call:
    p = as_problem(case)

    def image(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(device, dtype).contiguous(memory_format=FORMATS[layout])

    # y, which some derivatives are made of, lies between 0 and 1 as those of sigmoid and relu do in part.
    keeps = residual and activation != "none"
    other = None if not keeps else image(*case.input) if PROPERTIES[activation].needs_input else image(*case.input) / 2
    return Call(
        case,
        image(p.N, p.K, p.P, p.Q),
        (torch.randn(case.weight) * 0.3).to(device, dtype).contiguous(memory_format=FORMATS[layout]),
        layout == "channels_last",
        image(*case.input) if added else None,
        image(*case.input),
        torch.randn(p.C, device=device),
        torch.rand(p.C, device=device) + 0.5,
        torch.randn(p.C, device=device) if parameters else None,
        torch.randn(p.C, device=device) if parameters else None,
        other,
        activation,
    )


def check(call: Call, *, apart: bool) -> None:
    """g within the bound of its formula, and the sums within that of those of the g that was stored.

    - *∂L/∂y*: a sum of products and one addend, see tests/numerics.py; where the launches are ``apart`` it is rounded
      on its way from one to the other.
    - *act′(u)* is at most 1.5 (hardswish) and errs by at most the error of u, as act″ is at most 1: 16 roundings of
      what u is the sum of, as for a batch norm (tests/ops/batch_norm_calls.py), the mean counted in units of σ. As
      many are made on the way to the product.
    - *Sums* are random walks of n roundings, 6 ε √n of what is summed; x̂ errs as u does.
    """
    case, dtype, p = call.case, call.z.dtype, as_problem(call.case)
    g, sums = call()
    assert g.shape == case.input and g.dtype is dtype and sums.dtype is torch.float32
    assert g.is_contiguous(memory_format=FORMATS["channels_last" if call.channels_last else "NCHW"])

    double = Call(*(t.double().cpu() if isinstance(t, torch.Tensor) else t for t in call))
    value = reference.conv2d_input_grad(p, double.grad, double.weight, False)
    absolute = reference.conv2d_input_grad(p, double.grad.abs(), double.weight.abs(), False)
    if double.added is not None:
        value, absolute = value + double.added, absolute + double.added.abs()
    norm = double.z, double.norm_weight, double.norm_bias, double.other, double.mean, double.variance
    expected, normal, inverse = inner_gradient(value, *norm, EPS, call.activation, SLOPE)
    terms = p.group_outputs * p.R * p.S + 1
    products = sum_bound(value, absolute, terms, torch.float32, tf32=uses_tf32(dtype, conv_precision(dtype)))
    if apart:
        products += rounding_bound(value, dtype)

    def channels(numbers: torch.Tensor | None) -> torch.Tensor | int:
        return 0 if numbers is None else numbers.abs()[:, None, None]

    slack = 16 * FP32_EPS * (1 + channels(double.mean) * inverse)
    scale = 1 if double.norm_weight is None else channels(double.norm_weight)
    size = scale * (normal.abs() + 1) + channels(double.norm_bias)
    size = size + (0 if double.other is None else double.other.abs())
    bound = 1.5 * products + slack * (size + 1.5) * value.abs() + rounding_bound(expected, dtype)
    assert_within(f"{case.name}, g", g, expected, bound)

    stored, pixels = g.double().cpu(), (0, 2, 3)
    walk = 6 * FP32_EPS * (p.N * p.H * p.W) ** 0.5
    assert_within("Σ g", sums[0], stored.sum(pixels), walk * stored.abs().sum(pixels))
    bound = ((walk + slack) * stored.abs() * (normal.abs() + 1)).sum(pixels)
    assert_within("Σ g·x̂", sums[1], (stored * normal).sum(pixels), bound)


#: Of every kernel; channels and pixels that fill no tile.
CASES = (
    Case("1x1", (2, 40, 5, 7), 24, (1, 1)),
    Case("1x1, ragged", (3, 72, 7, 9), 136, (1, 1)),
    Case("1x1, long sum", (2, 72, 4, 6), 1032, (1, 1)),
    Case("1x1 stride 2", (2, 16, 8, 6), 24, (1, 1), stride=2),
    Case("3x3", (2, 24, 9, 7), 32, (3, 3), padding=1),
    Case("3x3 136 to 40", (3, 136, 7, 5), 40, (3, 3), padding=1),
    Case("3x3 ragged 5 to 3", (2, 5, 6, 6), 3, (3, 3), padding=1),
    Case("3x3 stride 2", (3, 40, 10, 12), 24, (3, 3), stride=2, padding=1),
    Case("3x3 stride 2, whole tiles", (2, 64, 6, 8), 40, (3, 3), stride=2, padding=1),
    Case("3x3 stride 2, odd", (2, 16, 9, 7), 24, (3, 3), stride=2, padding=1),
    Case("3x3 same, lopsided", (1, 16, 6, 7), 16, (4, 2), padding="same"),
    Case("stride beyond the kernel", (1, 16, 11, 13), 16, (2, 2), stride=4),
    Case("7x7 stride 2", (1, 3, 19, 17), 16, (7, 7), stride=2, padding=3),
    Case("7x7", (1, 18, 10, 9), 16, (7, 7), padding=3),
    Case("depthwise", (2, 40, 7, 6), 40, (3, 3), padding=1, groups=40),
    Case("depthwise stride 2", (2, 24, 10, 12), 24, (3, 3), stride=2, padding=1, groups=24),
    Case("depthwise multiplier 3", (1, 5, 8, 8), 15, (5, 5), stride=2, padding=2, groups=5),
    Case("groups of 4", (2, 64, 7, 6), 64, (3, 3), padding=1, groups=16),
    Case("groups of 8, stride 2", (1, 64, 9, 10), 64, (3, 3), stride=2, padding=1, groups=8),
    Case("groups of 16 and 24", (1, 32, 7, 6), 48, (3, 3), padding=1, groups=2),
    Case("groups of 2 to 20", (1, 4, 6, 6), 40, (3, 3), padding=1, groups=2),
)
MAIN = next(case for case in CASES if case.name == "3x3")
#: One of few registers.
PLAN = ConvPlan(Variant.TAPS, 16, 16, 16, 4, 3)


def plans(case: Case, call: Call, device: torch.device) -> dict[Variant, ConvPlan]:
    """For each variant that goes on through a norm: the candidate with the smallest tile, of these the most splits."""
    p, dtype = as_problem(case), call.z.dtype
    strides = call.grad.stride(), call.weight.stride(), call.z.stride()
    operands = operands_of(p, Direction.INPUT_GRAD, strides, True, dtype, conv_precision(dtype))
    found: dict[Variant, ConvPlan] = {}
    for spec in (device_spec(device), *(() if device.type == "cuda" else (AMPERE,))):
        for plan in candidates(p, Direction.INPUT_GRAD, operands, spec):
            if only_measured(plan) or plan.pack[2] or not family_of(plan).takes_norm_grad(plan, call.activation):
                continue
            best = found.setdefault(plan.variant, plan)
            if (plan.block_m * plan.block_n, -plan.splits) < (best.block_m * best.block_n, -best.splits):
                found[plan.variant] = plan
    return found


@pytest.fixture
def in_one_launch(monkeypatch) -> None:
    """No launches apart."""
    monkeypatch.setattr(conv_norm_launch, "inner_gradient_and_sums", None)


@pytest.mark.usefixtures("in_one_launch")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_variant(case, layout, dtype, device):
    for call in (
        make(case, device, dtype, layout),
        make(case, device, dtype, layout, "silu", residual=True, added=False),
    ):
        for plan in plans(case, call, device).values():
            with force_plan(plan):
                check(call, apart=False)


@pytest.mark.usefixtures("in_one_launch")
@pytest.mark.parametrize(
    "name, variant", [("1x1, long sum", Variant.GEMM), ("3x3 136 to 40", Variant.BOX), ("3x3", Variant.TAPS)]
)
def test_split_sums(name, variant, device):
    """Only the last program of a tile goes on; the others leave neither values nor parts."""
    call = make(next(case for case in CASES if case.name == name), device, torch.float16)
    plan = plans(call.case, call, device)[variant]
    with force_plan(replace(plan, splits=3)):
        check(call, apart=False)
        first, second = call(), call()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_variant_is_tested(device):
    """All that run input gradients, but for the kernel that nothing can emulate."""
    found = {variant for case in CASES for variant in plans(case, make(case, device, torch.float16), device)}
    families = [family for family in FAMILIES if family.takes_norm_grad(PLAN, "relu")]
    assert found == {variant for family in families for variant in family.variants} - {Variant.FLAT}
    assert {family.name for family in families} == {"implicit_gemm", "tma_conv", "tma_gemm", "grouped", "depthwise"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("case", CASES[::4], ids=lambda case: case.name)
def test_launches_apart(case, layout, dtype, device, monkeypatch):
    """Where no kernel goes on through a norm."""
    monkeypatch.setattr(conv_norm_launch, "input_grad_norm", lambda *_: None)
    check(make(case, device, dtype, layout), apart=True)
    check(make(case, device, dtype, layout, "silu", residual=True, added=False), apart=True)
    check(make(case, device, dtype, layout, "none"), apart=True)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, residual, where):
    for added in (False, True):
        call = make(MAIN, where, torch.float16, "channels_last", activation, residual=residual, added=added)
        # Some kernels leave gelu's derivative to a launch of its own.
        check(call, apart=activation == "gelu")


def test_without_parameters(where):
    for dtype in DTYPES:
        check(make(MAIN, where, dtype, parameters=False), apart=False)


def test_operands_in_other_layouts(where):
    """Strided, expanded, parameters in the dtype of the images: as any backward pass may hand them over."""
    call = make(MAIN, where, torch.float16, activation="silu", residual=True)
    call = call._replace(
        z=call.z.repeat_interleave(2, 3)[..., ::2],
        added=call.added[:, :1, :, :1].expand(MAIN.input),
        other=call.other.contiguous(),
        grad=call.grad.contiguous(),
        norm_weight=call.norm_weight.half(),
        norm_bias=call.norm_bias.half().repeat_interleave(2)[::2],
        mean=call.mean.repeat_interleave(2)[::2],
    )
    check(call, apart=False)


def test_empty_batch(where):
    case = Case("batch 0", (0, 16, 6, 6), 16, (3, 3), padding=1)
    g, sums = make(case, where)()
    assert g.shape == case.input and torch.equal(sums.cpu(), torch.zeros(2, 16))


def test_same_bits_every_run(device):
    call = make(CASES[8], device, torch.float16)
    first, *others = (call() for _ in range(3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_errors(where):
    call = make(MAIN, where)
    with pytest.raises(RuntimeError, match=r"expected added to have shape \[2, 24, 9, 7\], but got \[1, 24, 9, 7\]"):
        call._replace(added=call.added[:1])()
    with pytest.raises(RuntimeError, match="expected grad to have shape"):
        call._replace(grad=call.grad[..., :1])()
    with pytest.raises(RuntimeError, match="same dtype"):
        call._replace(z=call.z.half())()
    with pytest.raises(RuntimeError, match="mean should contain 24 elements not 23"):
        call._replace(mean=call.mean[1:])()
    with pytest.raises(ValueError, match="unknown activation 'selu'"):
        call._replace(activation="selu")()


@pytest.fixture
def exclusions_of_this_test(monkeypatch) -> Iterator[list]:
    found: list = []
    monkeypatch.setattr(exclusions, "_found", found)
    yield found
    monkeypatch.undo()
    for cached in (heuristic_plan, norm_grad_plan):
        cached.cache_clear()
    forget()


@pytest.mark.usefixtures("in_one_launch")
def test_a_kernel_whose_descriptors_are_refused_is_planned_without(device, monkeypatch, exclusions_of_this_test):
    write, calls = conv_launch.launch_into, []

    def refuse_once(*arguments, **options):
        calls.append(arguments[0].plan.variant)
        if len(calls) == 1:
            raise DescriptorRefused("Failed to create tensor map descriptor")
        return write(*arguments, **options)

    monkeypatch.setattr(conv_launch, "launch_into", refuse_once)
    with pytest.warns(UserWarning, match="the driver refused a descriptor"):
        check(make(MAIN, device, torch.float16), apart=False)
    assert len(calls) == 2 and calls[0] is not calls[1]
    assert [each.variant for each in exclusions_of_this_test] == calls[:1]


def test_kernels_know_which_derivatives_take_the_input():
    assert {name for name in PROPERTIES if needs_input(name)} == {
        name for name, properties in PROPERTIES.items() if properties.needs_input
    }


def test_the_plan_is_that_of_the_input_gradient_where_registers_are_left():
    case = Case("3x3", (32, 128, 28, 28), 128, (3, 3), padding=1)
    p, operands = as_problem(case), Operands("float16")
    found = {(plan.block_m, plan.block_n, plan.num_warps): plan for plan in _boxes(p, operands)}
    few, many = found[64, 64, 4], found[256, 128, 8]
    assert norm_grad_plan(p, operands, H100, "relu", few) is few
    other = norm_grad_plan(p, operands, H100, "relu", many)
    ranked = [each.plan for each in ranking(p, Direction.INPUT_GRAD, operands, H100)]
    taking = [plan for plan in ranked if family_of(plan).takes_norm_grad(plan, "relu")]
    assert other == next(plan for plan in taking if not only_measured(plan))
    assert norm_grad_plan(p, operands, H100, "relu", replace(few, pack=(False, False, True))) is None
    empty = as_problem(replace(case, input=(0, 128, 28, 28)))
    assert norm_grad_plan(empty, operands, H100, "relu", few) is None


def _boxes(p, operands: Operands) -> list[ConvPlan]:
    every = candidates(p, Direction.INPUT_GRAD, operands, H100)
    return [plan for plan in every if plan.variant is Variant.BOX and plan.splits == 1]
