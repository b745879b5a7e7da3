"""8-bit forms of the kernels that read through descriptors, emulated with small tiles, against the reference path.

Sums of int8 are exact and every operation after them is rounded as in the reference: equal means bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from gpukern.conv import Direction, Layout, Operands, conv_problem, force_plan
from gpukern.conv.families import float8_sums
from gpukern.conv.families.registry import FAMILIES
from gpukern.conv.plan import ConvPlan, Variant
from gpukern.conv.problem import ConvProblem
from gpukern.conv.quantized import reference
from gpukern.runtime.device import A100, B200, H100
from tests.numerics import assert_within, sum_bound
from tests.ops.quantized_cases import BF16, E4M3, FP32, HALF, INT8, float_sums, numbers, same

pytestmark = pytest.mark.usefixtures("poisoned")

ops = torch.ops.gpukern
#: Activations made of operations that IEEE 754 rounds in one way only.
EXACT = ("none", "relu", "relu6", "leaky_relu", "hardsigmoid", "hardswish")
BOX = ConvPlan(Variant.BOX, 32, 32, 32, num_warps=4, num_stages=3, box=(2, 4, 4))
GEMM = ConvPlan(Variant.GEMM, 32, 32, 32, num_warps=4, num_stages=3)
STEM = ConvPlan(Variant.STEM, 32, 32, 32, num_warps=4, num_stages=3, box=(2, 4, 4))


def problem(input: tuple[int, ...], outputs: int, kernel: tuple[int, int], padding=(0, 0, 0, 0), stride=1, dilation=1):
    weight = outputs, input[1], *kernel
    dilation = (dilation, dilation) if isinstance(dilation, int) else dilation
    return conv_problem(input, weight, None, (stride, stride), padding, dilation, 1)


#: Channels that end within a tile and within a step; pixels, rows and images that end within a box.
BOXES = {
    "3x3": problem((3, 16, 9, 7), 48, (3, 3), (1, 1, 1, 1)),
    "2x2": problem((1, 80, 6, 6), 16, (2, 2)),
    "1x7": problem((2, 48, 3, 11), 32, (1, 7), (0, 0, 3, 3)),
    "lopsided, dilated 3 by 2": problem((2, 16, 9, 8), 16, (3, 3), (4, 1, 0, 5), dilation=(3, 2)),
    "batch of 5": problem((5, 16, 3, 3), 16, (3, 3), (1, 1, 1, 1)),
    "one pixel": problem((1, 16, 2, 3), 16, (2, 3)),
    "1x1 stride 2": problem((2, 32, 7, 9), 48, (1, 1), stride=2),
    "3x3 stride 2": problem((2, 32, 8, 10), 16, (3, 3), (1, 1, 1, 1), stride=2),
    "5x5 stride 2": problem((1, 64, 6, 8), 16, (5, 5), (4, 1, 3, 2), stride=2),
}
MATRICES = {
    "ragged": problem((3, 48, 5, 7), 80, (1, 1)),
    "one row": problem((1, 16, 1, 1), 16, (1, 1)),
    "long": problem((2, 208, 3, 3), 16, (1, 1)),
}
TINY = BOXES["3x3"]
PRODUCT = MATRICES["ragged"]
FIRST = problem((2, 3, 11, 9), 32, (3, 3), (1, 1, 1, 1), stride=2)


def operands(p: ConvProblem, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """x, w, scale and bias such that y is about 1."""
    x, w = numbers((p.N, p.C, p.H, p.W), dtype), numbers((p.K, p.C, p.R, p.S), dtype)
    size = {INT8: 74.0**2}.get(dtype, 0.09) * math.sqrt(p.C * p.R * p.S)
    tensors = x, w, (torch.rand(p.K) + 0.5) / size, torch.randn(p.K) * 0.5
    return [tensor.to(device) for tensor in tensors]


def output_scale(dtype: torch.dtype) -> float:
    return {INT8: 0.03, E4M3: 0.02}.get(dtype, 1.0)


def both(
    p: ConvProblem,
    plan: ConvPlan,
    tensors: list[torch.Tensor],
    residual: torch.Tensor | None = None,
    activation: str = "relu",
    dtype: torch.dtype = INT8,
    residual_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel of ``plan`` gives, and the reference."""
    written = activation, 0.1, residual_scale, output_scale(dtype), dtype, False
    with force_plan(plan):
        geometry = p.stride, p.padding, p.dilation, p.groups
        actual = ops.conv2d_quantized(*tensors, residual, *geometry, *written)
    on_cpu = (None if tensor is None else tensor.cpu() for tensor in (*tensors, residual))
    return actual.cpu(), reference.conv2d_quantized(p, *on_cpu, *written)


def check_int8(p: ConvProblem, plan: ConvPlan, device: torch.device, **given) -> torch.Tensor:
    actual, expected = both(p, plan, operands(p, INT8, device), **given)
    assert same(actual, expected)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    return actual


def like_output(p: ConvProblem, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return numbers((p.N, p.K, p.P, p.Q), dtype, spread=2.0).to(device)


# ---- int8 equals the reference -------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", BOXES.values(), ids=list(BOXES))
def test_boxes_of_int8_are_exact(p, device):
    check_int8(p, BOX, device)


@pytest.mark.parametrize("p", MATRICES.values(), ids=list(MATRICES))
def test_matrices_of_int8_are_exact(p, device):
    check_int8(p, GEMM, device)


@pytest.mark.parametrize(
    "plan, p", [(BOX, TINY), (BOX, BOXES["3x3 stride 2"]), (GEMM, PRODUCT)], ids=["box", "2", "gemm"]
)
def test_splits_of_int8_are_exact(plan, p, device):
    """Partial sums are whole numbers. Twice: counters are zero again."""
    for _ in range(2):
        check_int8(p, replace(plan, splits=2), device)


@pytest.mark.parametrize(
    "plan, p",
    [(BOX, problem((1, 1600, 1, 3), 16, (1, 2))), (GEMM, problem((3, 3200, 1, 1), 16, (1, 1)))],
    ids=["box", "gemm"],
)
def test_splits_keep_whole_numbers_that_fp32_cannot(plan, p, device):
    """The second half of a sum takes off nearly all of the first, more than 2²⁴."""
    x = torch.randint(125, 128, (p.N, p.C, p.H, p.W), dtype=INT8).contiguous(memory_format=torch.channels_last)
    w = torch.randint(125, 128, (p.K, p.C, p.R, p.S), dtype=INT8)
    w.view(p.K, -1)[:, p.C * p.S // 2 :] *= -1
    if p.S == 2:  # its steps go through the channels of one tap after the other
        w = torch.stack((w.abs()[..., 0], -w.abs()[..., 1]), -1)
    tensors = x.to(device), w.contiguous(memory_format=torch.channels_last).to(device), None, None
    actual, expected = both(p, replace(plan, splits=2), list(tensors), activation="none", dtype=FP32)
    assert torch.equal(actual, expected) and actual.abs().max() < 2**20 and 125**2 * p.C * p.S // 2 > 2**24


@pytest.mark.parametrize(
    "plan, p",
    [
        (replace(BOX, block_m=256, box=(4, 8, 8)), TINY),
        (replace(GEMM, block_m=64, block_n=64, num_warps=1), PRODUCT),
        (replace(GEMM, block_m=256, block_n=128, num_warps=8), PRODUCT),
    ],
    ids=["box", "gemm", "persistent"],
)
def test_tiles_in_two_parts_are_exact(plan, p, device):
    residual = like_output(p, INT8, device)
    check_int8(p, plan, device, residual=residual, residual_scale=0.013)


@pytest.mark.parametrize("activation", EXACT)
@pytest.mark.parametrize("plan, p", [(BOX, TINY), (GEMM, PRODUCT)], ids=["box", "gemm"])
def test_epilogues_of_int8_are_exact(plan, p, activation, device):
    residual = like_output(p, INT8, device)
    check_int8(p, plan, device, residual=residual, residual_scale=0.013, activation=activation)


@pytest.mark.parametrize("dtype", [E4M3, HALF, BF16, FP32], ids=str)
@pytest.mark.parametrize("plan, p", [(BOX, TINY), (GEMM, PRODUCT)], ids=["box", "gemm"])
def test_other_outputs_of_int8_are_exact(plan, p, dtype, device):
    check_int8(p, plan, device, dtype=dtype, residual=like_output(p, INT8, device), residual_scale=0.013)
    check_int8(p, plan, device, dtype=dtype, activation="none", residual=like_output(p, HALF, device))


def test_absent_scale_and_bias(device):
    for plan, p in ((BOX, TINY), (GEMM, PRODUCT)):
        x, w, *_ = operands(p, INT8, device)
        actual, expected = both(p, plan, [(x // 16), (w // 16), None, None])
        assert same(actual, expected) and actual.any()


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize(
    "plan, p, kind",
    [
        (BOX, TINY, INT8),
        (replace(BOX, splits=2), TINY, INT8),
        (replace(BOX, block_m=256, box=(4, 8, 8)), TINY, INT8),
        (STEM, FIRST, HALF),
    ],
    ids=["box", "splits", "parts", "stem"],
)
def test_maxima_of_2x2_pixels(plan, p, kind, activation, device, monkeypatch):
    """relu is left to the rounding, which follows the maxima; leaky_relu is not."""
    monkeypatch.setattr("gpukern.conv.quantized.launch.pooled_choice", lambda *_: plan)
    tensors = operands(p, kind, device)
    geometry = p.stride, p.padding, p.dilation, p.groups
    written = activation, 0.1, 1.0, 0.03, INT8, True
    actual = ops.conv2d_quantized(*tensors, None, *geometry, *written).cpu()
    expected = reference.conv2d_quantized(p, *(tensor.cpu() for tensor in tensors), None, *written)
    apart = (actual.int() - expected.int()).abs()
    # Sums of floats may be added in another order, and then round to a neighbour.
    assert apart.max() <= (kind is HALF) and (apart > 0).double().mean() <= 0.02
    assert actual.shape == (p.N, p.K, p.P // 2, p.Q // 2) and actual.double().std() > 5


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("dtype", [INT8, E4M3, BF16], ids=str)
def test_nan_and_infinity(dtype, activation, device):
    """In int8 a NaN is 0 and infinity saturates; elsewhere a NaN stays one."""
    for plan, p in ((BOX, TINY), (GEMM, PRODUCT)):
        x, w, scale, bias = operands(p, INT8, device)
        scale[:3], bias[3:6] = torch.tensor([math.nan, math.inf, -math.inf]), torch.tensor([-math.nan, 1e30, -1e30])
        actual, expected = both(p, plan, [x, w, scale, bias], activation=activation, dtype=dtype)
        assert same(actual, expected)
        assert dtype is INT8 or actual.double()[:, 0].isnan().all()


def test_views_of_int8(device):
    """Crops of larger tensors: only their channels lie side by side."""
    p = TINY
    x, w, scale, bias = operands(p, INT8, device)
    wide = torch.empty((p.N, p.C + 16, p.H + 2, p.W + 3), dtype=INT8, device=device)
    wide = wide.fill_(99).contiguous(memory_format=torch.channels_last)
    crop = wide[:, 16:, 2:, 1 : p.W + 1]
    crop.copy_(x)
    actual, expected = both(p, BOX, [crop, w, scale, bias])
    assert same(actual, expected)


def test_linear_of_int8_is_exact(device):
    x, w = (numbers(shape, INT8).to(device) for shape in ((19, 208), (48, 208)))
    scale, bias = (torch.rand(48) * 1e-5).to(device), torch.randn(48).to(device)
    written = "relu", 0.0, 0.02, INT8
    with force_plan(GEMM):
        actual = ops.linear_quantized(x, w, scale, bias, *written)
    assert same(actual.cpu(), reference.linear_quantized(x.cpu(), w.cpu(), scale.cpu(), bias.cpu(), *written))


# ---- floats: within the bound of their sums ------------------------------------------------------------------------


def check_floats(p: ConvProblem, plan: ConvPlan, kind: torch.dtype, dtype: torch.dtype, device, residual=None) -> None:
    tensors = operands(p, kind, device)
    scale, bias = (tensor.double().cpu().view(-1, 1, 1) for tensor in tensors[2:])
    actual, _ = both(p, plan, tensors, residual, dtype=dtype)
    added = 0.0 if residual is None else residual.double().cpu()
    exact, absolute = (torch.from_numpy(sums) for sums in float_sums(p, *tensors[:2]))
    step = output_scale(dtype)
    truth = (exact * scale + bias + added).clamp(min=0) / step
    bound = sum_bound(truth, (absolute * scale + bias.abs() + abs(added)) / step, p.C * p.R * p.S + 3, FP32)
    largest = {INT8: 127.0, E4M3: 448.0}.get(dtype, math.inf)
    quantum = torch.full_like(truth, 0.5) if dtype is INT8 else truth.abs() * torch.finfo(dtype).eps / 2
    smallest = {E4M3: 2.0**-10, HALF: 2.0**-25}.get(dtype, 2.0**-134)
    assert_within(str(plan), actual, truth.clamp(max=largest), 1.01 * bound + quantum + smallest)


@pytest.mark.parametrize("dtype", [E4M3, BF16], ids=str)
@pytest.mark.parametrize(
    "plan, p", [(BOX, TINY), (BOX, BOXES["3x3 stride 2"]), (GEMM, PRODUCT)], ids=["box", "2", "gemm"]
)
def test_sums_of_float8(plan, p, dtype, device):
    check_floats(p, plan, E4M3, dtype, device, like_output(p, BF16, device))
    check_floats(p, replace(plan, splits=2), E4M3, dtype, device)


@pytest.mark.parametrize("kind", [HALF, BF16], ids=str)
@pytest.mark.parametrize("dtype", [INT8, E4M3], ids=str)
@pytest.mark.parametrize("plan, p", [(BOX, TINY), (GEMM, PRODUCT), (STEM, FIRST)], ids=["box", "gemm", "stem"])
def test_16_bits_with_an_output_in_8(plan, p, kind, dtype, device):
    check_floats(p, plan, kind, dtype, device, like_output(p, kind, device))


def test_long_sums_of_float8_leave_the_tensor_cores_in_runs(device, monkeypatch):
    """A box's runs divide its steps; a matrix product's last one reads zeros beyond the end."""
    monkeypatch.setattr(float8_sums, "_MOST_PRODUCTS", 64)
    p, long = problem((1, 80, 4, 4), 16, (3, 3), (1, 1, 1, 1)), MATRICES["long"]
    assert float8_sums.even_runs(9 * 3, 32, "float8_e4m3fn", H100) == 27
    assert float8_sums.least_runs(7, 32, "float8_e4m3fn", H100) == 4
    check_floats(p, BOX, E4M3, E4M3, device)
    check_floats(long, GEMM, E4M3, E4M3, device)
    check_floats(long, replace(GEMM, splits=2), E4M3, E4M3, device)


def test_only_long_sums_of_float8_have_runs():
    assert float8_sums.least_runs(16, 128, "float8_e4m3fn", H100) == 1
    assert float8_sums.least_runs(17, 128, "float8_e4m3fn", H100) == 2
    assert float8_sums.even_runs(36, 128, "float8_e4m3fn", H100) == 3
    assert float8_sums.least_runs(36, 128, "int8", H100) == 1
    assert float8_sums.least_runs(36, 128, "float8_e4m3fn", B200) == 1


# ---- plans ---------------------------------------------------------------------------------------------------------


def offered(p: ConvProblem, operands: Operands, device=H100, direction=Direction.FORWARD) -> dict[str, list[ConvPlan]]:
    """Plans of these families, by family, with operands as they are."""
    families = [family for family in FAMILIES if family.name in ("tma_gemm", "tma_conv", "tma_stem")]
    found = {family.name: list(family.candidates(p, direction, operands, device)) for family in families}
    return {name: plans for name, plans in found.items() if plans}


WHOLE = Operands("int8", first_dtype="int8", output_dtype="int8")
FLOAT8 = Operands("float8_e4m3fn", first_dtype="float8_e4m3fn", output_dtype="float8_e4m3fn")
STAGE = problem((32, 64, 56, 56), 64, (3, 3), (1, 1, 1, 1))
POINTWISE = problem((32, 256, 56, 56), 64, (1, 1))


@pytest.mark.parametrize("types", [WHOLE, FLOAT8], ids=["int8", "float8"])
def test_serves_what_the_kernels_can(types):
    assert set(offered(STAGE, types)) == {"tma_conv"} and set(offered(POINTWISE, types)) == {"tma_gemm"}
    assert not offered(STAGE, types, A100)
    assert not offered(STAGE, replace(types, first=Layout.CHANNELS))  # such as 24 channels
    assert not offered(problem((32, 64, 56, 56), 24, (3, 3)), replace(types, output_dtype="float16"))
    assert not offered(STAGE, types, direction=Direction.INPUT_GRAD)
    # The tensor cores take 8 bits only from runs along the sum.
    assert not offered(POINTWISE, replace(types, second=Layout.TRANSPOSED))
    assert offered(POINTWISE, replace(types, second=Layout.TRANSPOSED), direction=Direction.INPUT_GRAD)
    assert not offered(POINTWISE, replace(types, first=Layout.NCHW, output=Layout.NCHW))
    # Operands that would be converted on the way.
    assert not offered(STAGE, replace(types, dtype="float16")) and not offered(
        POINTWISE, replace(types, dtype="bfloat16")
    )


def test_the_first_layer_of_16_bits_has_plans_with_an_output_in_8():
    first = problem((32, 3, 224, 224), 64, (7, 7), (3, 3, 3, 3), stride=2)
    half = Operands("float16", first=Layout.STRIDED, first_dtype="float16", output_dtype="int8")
    assert set(offered(first, half)) == {"tma_stem"}
    assert not offered(first, replace(half, dtype="int8", first_dtype="int8"))


@pytest.mark.parametrize("channels, step", [(16, 32), (32, 32), (64, 64), (128, 128), (512, 128)])
def test_steps_are_lines_of_128_bytes_at_most(channels, step):
    pointwise, stage = problem((32, channels, 14, 14), 64, (1, 1)), problem((32, channels, 14, 14), 64, (3, 3))
    for plans in (offered(pointwise, WHOLE)["tma_gemm"], offered(stage, WHOLE)["tma_conv"]):
        assert {plan.block_k for plan in plans} == {step}
        for plan in plans:
            assert plan.num_stages * (plan.block_m + plan.block_n) * step <= H100.shared_memory


def test_steps_at_a_stride_of_2_end_with_the_channels():
    for channels, step in ((32, 32), (96, 32), (64, 64), (256, 128)):
        halved = problem((32, channels, 14, 14), 64, (3, 3), (1, 1, 1, 1), stride=2)
        assert {plan.block_k for plan in offered(halved, WHOLE)["tma_conv"]} == {step}
    assert not offered(problem((32, 48, 14, 14), 64, (3, 3), stride=2), WHOLE)


def test_tiles_of_long_float8_sums_leave_registers_for_a_second_one():
    long = problem((32, 512, 14, 14), 512, (3, 3), (1, 1, 1, 1))
    assert {plan.sums_per_thread for plan in offered(long, FLOAT8)["tma_conv"]} <= {16, 32, 64}
    assert 128 in {plan.sums_per_thread for plan in offered(long, WHOLE)["tma_conv"]}
