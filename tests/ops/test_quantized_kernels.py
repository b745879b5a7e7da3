"""The kernels of the operators in 8 bits against the reference: the same bits of int8, floats within their bound."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from gpukern.conv import ConvPlan, Direction, Variant, conv_problem, force_plan, observe
from gpukern.conv.database import key
from gpukern.conv.families.registry import family_of
from gpukern.conv.planner import candidates
from gpukern.conv.problem import transposed_problem
from gpukern.conv.request import Types, operands_of
from gpukern.ops._activation.properties import PROPERTIES
from gpukern.ops.quantized_conv2d import conv2d_quantized
from gpukern.ops.quantized_conv_transpose2d import conv_transpose2d_quantized
from gpukern.ops.quantized_linear import linear_quantized
from gpukern.runtime.current_device import pretend
from gpukern.runtime.device import A100, H100, L4
from gpukern.runtime.mode import Mode, force_mode
from tests.numerics import FP32_EPS
from tests.ops.conv_cases import CASES, Case, as_problem
from tests.ops.quantized_cases import BF16, E4M3, EIGHT, FP32, HALF, INT8, OUTPUTS, PAIRS, numbers, same

pytestmark = pytest.mark.usefixtures("poisoned")

TINY = Case("tiny", (2, 17, 5, 6), 9, (3, 2), padding=1)
SPLIT = Case("split", (1, 260, 4, 4), 24, (3, 3), padding=1)


def reference(operator, *arguments) -> torch.Tensor:
    with force_mode(Mode.REFERENCE):
        return operator(*(t.cpu() if isinstance(t, torch.Tensor) else t for t in arguments))


def check(operator, *arguments) -> None:
    """The same result in the same layout; floats may be summed in another order, and then rounded to a neighbour."""
    actual, expected = operator(*arguments), reference(operator, *arguments)
    assert actual.stride() == expected.stride()
    exact = all(t.dtype is INT8 for t in arguments[:2])
    if exact:
        assert same(actual.cpu(), expected)
        return
    assert actual.dtype is expected.dtype
    y, r = actual.cpu().double(), expected.double()
    eps = {INT8: 0.0, E4M3: 0.125, HALF: 2.0**-10, BF16: 2.0**-7, FP32: 64 * FP32_EPS}[actual.dtype]
    step = 1.0 if actual.dtype is INT8 else {E4M3: 2.0**-9}.get(actual.dtype, 1e-4)
    apart = (y - r).abs()
    assert (apart <= eps * r.abs() + step).all()
    if actual.dtype is not FP32:  # a neighbour only where the exact number is near the middle
        assert (apart > 0).sum() <= 0.05 * apart.numel()


def tensors(case: Case, pair=(INT8, INT8), last: bool = True, device=None) -> tuple[torch.Tensor, ...]:
    p = as_problem(case)
    x, w = (numbers(shape, dtype, last) for shape, dtype in zip((case.input, case.weight), pair, strict=True))
    size = math.prod(74.0 if dtype is INT8 else 0.3 for dtype in pair) * math.sqrt(p.group_inputs * p.R * p.S)
    scale, bias = (torch.rand(case.outputs) + 0.5) / size, torch.randn(case.outputs) * 0.5
    return tuple(t.to(device) for t in (x, w, scale, bias))


def geometry(p) -> tuple:
    return p.stride, p.padding, p.dilation, p.groups


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "NCHW"])
def test_int8_of_every_shape(case, last, device):
    operands = tensors(case, last=last, device=device)
    check(conv2d_quantized, *operands, None, *geometry(as_problem(case)), "relu", 0.0, 1.0, 0.02, INT8, False)


@pytest.mark.parametrize("pair, dtype", [*itertools.product(PAIRS, OUTPUTS)], ids=str)
def test_every_dtype(pair, dtype, device):
    p, scale = as_problem(TINY), 0.02 if dtype in EIGHT else 1.0
    residual = numbers((p.N, p.K, p.P, p.Q), dtype if dtype is not FP32 else INT8).to(device)
    of_residual = 0.01 if residual.dtype in EIGHT else 1.0
    operands = tensors(TINY, pair, device=device)
    check(conv2d_quantized, *operands, residual, *geometry(p), "none", 0.0, of_residual, scale, dtype, False)


@pytest.mark.parametrize("dtype", [INT8, E4M3, FP32], ids=str)
def test_operands_in_fp32(dtype, device, full_fp32):
    p = as_problem(TINY)
    operands = tensors(TINY, (FP32, FP32), device=device)
    scale = 0.02 if dtype in EIGHT else 1.0
    check(conv2d_quantized, *operands, None, *geometry(p), "relu", 0.0, 1.0, scale, dtype, False)


@pytest.mark.parametrize("activation", ["none", *PROPERTIES])
def test_every_activation(activation, device):
    p = as_problem(TINY)
    x, w, scale, bias = tensors(TINY, device=device)
    arguments = x, w, scale, bias, None, *geometry(p), activation, 0.1, 1.0, 0.02, INT8, False
    if activation in ("none", "relu", "relu6", "leaky_relu", "hardsigmoid", "hardswish"):
        check(conv2d_quantized, *arguments)
        return
    apart = conv2d_quantized(*arguments).cpu().int() - reference(conv2d_quantized, *arguments).int()
    assert apart.abs().max() <= 1 and (apart != 0).double().mean() < 0.02


@pytest.mark.parametrize("with_scale, with_bias", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("kind", [None, INT8, E4M3, HALF, FP32], ids=str)
def test_every_epilogue(with_scale, with_bias, kind, device):
    p = as_problem(TINY)
    x, w, scale, bias = tensors(TINY, device=device)
    residual = None
    if kind is not None:
        residual = numbers((p.N, p.K, p.P, p.Q), kind, last=False, spread=2.0).to(device)  # laid out otherwise
    scales = 0.7 if kind in EIGHT else 1.0, 0.02 if with_scale else 2e3
    given = scale if with_scale else None, bias if with_bias else None, residual
    check(conv2d_quantized, x, w, *given, *geometry(p), "leaky_relu", 0.1, *scales, INT8, False)


@pytest.mark.parametrize("pair", [(INT8, INT8), (E4M3, E4M3), (HALF, HALF)], ids=str)
@pytest.mark.parametrize("case", [TINY, SPLIT, CASES[14]], ids=lambda case: case.name)
def test_pooled(case, pair, device):
    p = as_problem(case)
    operands = tensors(case, pair, device=device)
    dtype = pair[0] if pair[0] in EIGHT else INT8
    check(conv2d_quantized, *operands, None, *geometry(p), "relu", 0.0, 1.0, 0.02, dtype, True)


@pytest.mark.parametrize("pair", [(INT8, INT8), (E4M3, E4M3), (INT8, HALF)], ids=str)
def test_split_sums(pair, device):
    p = as_problem(SPLIT)
    plan = ConvPlan(Variant.TAPS, 16, 32, 32, num_warps=4, num_stages=2, splits=4)
    with force_plan(plan):
        operands = tensors(SPLIT, pair, device=device)
        check(conv2d_quantized, *operands, None, *geometry(p), "relu", 0.0, 1.0, 0.02, pair[0], False)


TRANSPOSED = (
    ((2, 6, 4, 5), (6, 3, 3, 2), ((2, 1), (1, 0), (1, 0), (1, 2), 1)),
    ((1, 6, 4, 5), (6, 3, 2, 2), ((2, 2), (0, 0), (0, 0), (1, 1), 2)),
    ((0, 6, 4, 5), (6, 3, 3, 3), ((2, 2), (1, 1), (1, 1), (1, 1), 1)),
    ((1, 40, 3, 3), (40, 17, 4, 4), ((2, 2), (1, 1), (0, 0), (1, 1), 1)),
)


@pytest.mark.parametrize("input, weight, shape", TRANSPOSED)
@pytest.mark.parametrize("pair", [(INT8, INT8), (E4M3, E4M3), (INT8, BF16)], ids=str)
def test_transposed(input, weight, shape, pair, device):
    p = transposed_problem(input, weight, None, *shape)
    x, w = (numbers(sizes, dtype).to(device) for sizes, dtype in zip((input, weight), pair, strict=True))
    if pair[0] is INT8:
        w = w.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)  # in runs along the sum, as tensor cores want bytes
    scale, bias = (torch.rand(p.C) * 1e-2).to(device), torch.randn(p.C).to(device)
    residual = numbers((p.N, p.C, p.H, p.W), INT8).to(device)
    check(conv_transpose2d_quantized, x, w, scale, bias, residual, *shape, "relu6", 0.0, 0.02, 0.05, INT8)


@pytest.mark.parametrize("sizes", [(5, 33, 7), (0, 8, 4), (3, 0, 4), (70, 64, 48), (4, 2050, 10)])
def test_linear(sizes, device):
    rows, inputs, outputs = sizes
    scale, bias = torch.rand(outputs).to(device) * 1e-3, torch.randn(outputs).to(device)
    for pair, dtype in (((INT8, INT8), INT8), ((E4M3, E4M3), E4M3), ((INT8, HALF), HALF), ((BF16, BF16), INT8)):
        x, w = numbers((rows, inputs), pair[0]).to(device), numbers((outputs, inputs), pair[1]).to(device)
        output_scale = 0.05 if dtype in EIGHT else 1.0
        check(linear_quantized, x, w, scale, bias, "relu", 0.0, output_scale, dtype)


def test_views_and_odd_addresses(device):
    p = as_problem(TINY)
    _, w, scale, bias = tensors(TINY, device=device)
    wide = numbers((2, 40, 7, 9), INT8).to(device)
    for given in (wide[:, 3:20, 1:6, 2:8], wide[:, :34:2, 1:6, 2:8], wide[:, 3:20, 1:6, 2:8].flip(3)):
        arguments = *geometry(p), "relu", 0.0, 1.0, 0.02, INT8, False
        check(conv2d_quantized, given, w, scale.repeat(2)[::2], bias, None, *arguments)


def test_rounding_saturates_and_nans_are_zero(device):
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, 126.5, 127.5, 1e9, -1e9, math.inf, -math.inf, math.nan, -127.6]).half()
    w = torch.ones(1, 1, 1, 1).half().to(device)
    image = x.view(1, 1, 1, -1).to(device)
    for dtype in EIGHT:
        arguments = None, None, None, (1, 1), (0, 0, 0, 0), (1, 1), 1, "none", 0.0, 1.0, 1.0, dtype, False
        y = conv2d_quantized(image, w, *arguments).cpu()
        assert same(y, reference(conv2d_quantized, image, w, *arguments))
        if dtype is INT8:
            assert y.flatten().tolist() == [0, 2, 2, 0, 126, 127, 127, -127, 127, -127, 0, -127]


# ---- plans ---------------------------------------------------------------------------------------------------------


def test_every_candidate_is_exact(device):
    """Of a layer that fills tiles and of one that does not, on a device of each kind of tensor core."""
    seen = []
    for case in (Case("even", (1, 64, 5, 7), 64, (3, 3), padding=1), Case("odd", (1, 40, 5, 5), 24, (1, 1))):
        p = as_problem(case)
        operands = tensors(case, device=device)
        arguments = *operands, None, *geometry(p), "relu", 0.0, 1.0, 0.02, INT8, False
        expected = reference(conv2d_quantized, *arguments)
        calls = []
        with observe(lambda call, _, calls=calls: calls.append(call)):
            conv2d_quantized(*arguments)
        for spec in (A100, H100):
            for plan in candidates(calls[0].problem, Direction.FORWARD, calls[0].operands, spec):
                if family_of(plan).name == "implicit_gemm" and not any(plan.pack) and plan not in seen:
                    seen.append(plan)
                    with force_plan(plan):
                        assert same(conv2d_quantized(*arguments).cpu(), expected), plan
    assert len(seen) >= 8


def test_float8_needs_tensor_cores_that_have_it():
    x, w = (torch.empty(2, 16, 4, 4, device="meta"), torch.empty(16, 16, 1, 1, device="meta"))
    plain = (1, 1), (0, 0, 0, 0), (1, 1), 1, "none", 0.0, 1.0
    small = x.to(E4M3), w.to(E4M3)
    whole = x.to(INT8), w.to(INT8)
    with force_mode(Mode.KERNELS), pretend(A100):
        for operands, residual, dtype in (
            (small, None, HALF),
            (whole, None, E4M3),
            (whole, x.to(E4M3), HALF),
            ((small[0], w.half()), None, HALF),
        ):
            with pytest.raises(NotImplementedError, match="float8_e4m3fn needs a GPU of compute capability"):
                conv2d_quantized(*operands, None, None, residual, *plain, 1.0, dtype, False)


def test_float8_with_sums_added_apart(device):
    """As on Ada, whose tensor cores add in few bits and are given no sum to add to."""
    p = as_problem(SPLIT)
    operands = tensors(SPLIT, (E4M3, E4M3), device=device)
    with pretend(L4):
        check(conv2d_quantized, *operands, None, *geometry(p), "relu", 0.0, 1.0, 0.02, E4M3, False)


def test_ordinary_plans_keep_their_keys():
    """The plan database of earlier versions stays right; quantized launches have words of their own."""
    p = conv_problem((8, 64, 14, 14), (64, 64, 1, 1), None, (1, 1), (0, 0, 0, 0), (1, 1), 1)
    last = (64 * 14 * 14, 1, 64 * 14, 64), (64, 1, 64, 64), (64 * 14 * 14, 1, 64 * 14, 64)

    def words(dtype, types=None):
        operands = operands_of(p, Direction.FORWARD, last, True, dtype, "ieee", types)
        return key(p, Direction.FORWARD, operands).split("; ")[1]

    assert words(HALF) == "float16 ieee"
    assert words(INT8, Types(INT8, INT8)) == "int8 ieee"
    assert words(E4M3, Types(E4M3, HALF)) == "float8_e4m3fn -> float16 ieee"
    assert words(HALF, Types(INT8, INT8)) == "int8 * float16 -> int8 ieee"
    assert words(HALF, Types(HALF, INT8)) == "float16 -> int8 ieee"
