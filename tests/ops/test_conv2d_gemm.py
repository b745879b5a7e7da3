"""Matrix products by descriptors, with tiles small enough that every edge of them is met, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gpukern.conv import reference
from gpukern.conv.families.tma_gemm import plan as gemm
from gpukern.conv.launch import prepared_for, run
from gpukern.conv.plan import ConvPlan, Direction, Layout, Operands, Variant
from gpukern.conv.problem import ConvProblem
from gpukern.conv.request import Epilogue
from gpukern.ops._activation.properties import PROPERTIES
from gpukern.ops._activation.reference import activation as reference_activation
from gpukern.runtime.device import A100, H100
from gpukern.runtime.precision import conv_precision
from tests.numerics import FP32_EPS, assert_within, sum_bound, uses_tf32
from tests.ops.conv_cases import Case, as_problem

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}

#: All channels ragged; one pixel, fewer pixels than a tile, tiles that end within an image. In NCHW a plane must be
#: whole units of 16 bytes.
CASES = (
    Case("40 to 24", (2, 40, 4, 6), 24, (1, 1)),
    Case("8 to 136", (3, 8, 2, 4), 136, (1, 1)),
    Case("136 to 8, one image", (1, 136, 5, 8), 8, (1, 1)),
)
#: A tile in one piece, in two, and taken by programs that stay for more.
WHOLE = ConvPlan(Variant.GEMM, 32, 16, 16, num_warps=4, num_stages=2)
IN_PARTS = ConvPlan(Variant.GEMM, 64, 64, 16, num_warps=1, num_stages=2)
PERSISTENT = ConvPlan(Variant.GEMM, 256, 128, 16, num_warps=8, num_stages=2)


def image(shape, dtype, device, layout: str = "channels_last") -> torch.Tensor:
    return torch.randn(shape).to(device, dtype).contiguous(memory_format=FORMATS[layout])


def operands(case: Case, dtype, device, layout: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, w, dy."""
    p = as_problem(case)
    weight = (torch.randn(case.weight) * 0.3).to(device, dtype)
    return image(case.input, dtype, device, layout), weight, image((p.N, p.K, p.P, p.Q), dtype, device, layout)


def for_layout(plan: ConvPlan, layout: str, dtype: torch.dtype, direction: Direction = Direction.FORWARD) -> ConvPlan:
    """``plan`` as it would be for ``layout``."""
    pixels = plan.block_k if direction is Direction.WEIGHT_GRAD else plan.block_m
    return replace(plan, box=(1, 1, pixels) if layout == "NCHW" else None, precision=conv_precision(dtype))


def check(
    p: ConvProblem,
    direction: Direction,
    first: torch.Tensor,
    second: torch.Tensor,
    plan: ConvPlan,
    channels_last: bool = True,
) -> torch.Tensor:
    prepared = prepared_for(p, direction, first, second, channels_last, plan=plan)
    actual, _ = run(prepared, first, second)
    value, absolute = truth(p, direction, first, second), truth(p, direction, first.abs(), second.abs())
    terms = {Direction.FORWARD: p.C, Direction.INPUT_GRAD: p.K, Direction.WEIGHT_GRAD: p.N * p.P * p.Q}[direction]
    tf32 = uses_tf32(first.dtype, plan.precision)
    assert_within(
        f"{direction.value}, {plan}", actual, value, sum_bound(value, absolute, terms, first.dtype, tf32=tf32)
    )
    return actual


def truth(p: ConvProblem, direction: Direction, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    first, second = first.double().cpu(), second.double().cpu()
    if direction is Direction.FORWARD:
        return reference.conv2d(p, first, second, None, None, "none", 0.0)
    compute = reference.conv2d_input_grad if direction is Direction.INPUT_GRAD else reference.conv2d_weight_grad
    return compute(p, first, second, False)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_direction(case, dtype, layout, device):
    p = as_problem(case)
    x, w, dy = operands(case, dtype, device, layout)
    last = layout == "channels_last"
    for plan in (WHOLE, IN_PARTS):
        plan = for_layout(plan, layout, dtype)
        check(p, Direction.FORWARD, x, w, plan, last)
        check(p, Direction.INPUT_GRAD, dy, w, plan, last)
    plan = for_layout(WHOLE, layout, dtype, Direction.WEIGHT_GRAD)
    check(p, Direction.WEIGHT_GRAD, dy, x, plan)


@pytest.mark.parametrize("splits", [2, 3, 7])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("direction", Direction, ids=lambda direction: direction.value)
def test_splits(direction, layout, splits, device):
    """Of five steps or so: shares that are not even, and some that are empty. Twice: counters are zero again."""
    case = CASES[2] if direction is Direction.FORWARD else Case("20 to 72", (2, 24, 3, 8), 72, (1, 1))
    p = as_problem(case)
    x, w, dy = operands(case, torch.float16, device, layout)
    first, second = {Direction.FORWARD: (x, w), Direction.INPUT_GRAD: (dy, w), Direction.WEIGHT_GRAD: (dy, x)}[
        direction
    ]
    plan = replace(for_layout(WHOLE, layout, torch.float16, direction), block_k=16, splits=splits)
    results = [check(p, direction, first, second, plan, layout == "channels_last") for _ in range(2)]
    assert torch.equal(*results)


@pytest.mark.parametrize("layout", FORMATS)
def test_programs_that_stay(layout, device):
    """More tiles than programs, the last ones of both dimensions ragged."""
    case = Case("24 to 136", (3, 24, 15, 24), 136, (1, 1))
    p = as_problem(case)
    plan = for_layout(PERSISTENT, layout, torch.float16)
    assert gemm.persistent(plan) and gemm.tile_count(p, Direction.FORWARD, plan) > 4
    x, w, dy = operands(case, torch.float16, device, layout)
    check(p, Direction.FORWARD, x, w, plan, layout == "channels_last")
    check(p, Direction.INPUT_GRAD, dy, w, plan, layout == "channels_last")


@pytest.mark.parametrize("name", ["none", *PROPERTIES])
@pytest.mark.parametrize(
    "layout, plan",
    [
        ("channels_last", IN_PARTS),
        ("NCHW", WHOLE),
        ("NCHW", IN_PARTS),
        ("channels_last", replace(WHOLE, splits=2)),
    ],
    ids=["parts", "NCHW", "NCHW, parts", "splits"],
)
def test_epilogue(layout, plan, name, device):
    dtype, case = torch.bfloat16, CASES[0]
    p, plan = as_problem(case), for_layout(plan, layout, dtype)
    x, w, residual = operands(case, dtype, device, layout)
    bias = torch.randn(p.K).to(device, dtype)
    epilogue = Epilogue(name, residual=True)
    prepared = prepared_for(p, Direction.FORWARD, x, w, layout == "channels_last", epilogue, plan)
    actual, _ = run(prepared, x, w, bias, residual, 0.1)
    added = bias.double().cpu()[:, None, None] + residual.double().cpu()
    value = reference_activation(truth(p, Direction.FORWARD, x, w) + added, name, 0.1)
    absolute = truth(p, Direction.FORWARD, x.abs(), w.abs()) + bias.double().cpu().abs()[:, None, None]
    absolute += residual.double().cpu().abs()
    # gelu's and silu's slopes reach 1.13, hardswish's 1.5.
    assert_within(name, actual, value, 1.5 * sum_bound(value, absolute, p.C + 2, dtype))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("plan", [WHOLE, IN_PARTS, replace(WHOLE, splits=2)], ids=["whole", "parts", "splits"])
def test_statistics_of_each_tile(plan, layout, device):
    """Sum, squared deviations and count of the stored values: tiles beyond the last pixel count none."""
    case = Case("24 to 40", (2, 24, 5, 8), 40, (1, 1))
    p, plan = as_problem(case), for_layout(plan, layout, torch.float16)
    x, w, _ = operands(case, torch.float16, device, layout)
    prepared = prepared_for(p, Direction.FORWARD, x, w, layout == "channels_last", Epilogue(statistics=True), plan)
    y, statistics = run(prepared, x, w)
    tiles = prepared.launch.tiles.rows * prepared.launch.tiles.parts
    parts = statistics.parts[: 3 * tiles * p.K].view(3, tiles, p.K)
    size = plan.block_m // gemm.parts(plan)
    images, pixels = gemm.matrices(p, plan)
    values = y.double().cpu().permute(0, 2, 3, 1).reshape(images, pixels, p.K)
    values = torch.nn.functional.pad(values, (0, 0, 0, -pixels % plan.block_m), value=float("nan"))
    values = values.reshape(-1, size, p.K)
    counts = (~values.isnan()).sum(1).double()
    sums = values.nansum(1)
    deviations = (values - (sums / counts)[:, None]).square().nansum(1)
    eps = 6 * FP32_EPS * size**0.5
    assert_within("count", parts[2], counts, torch.zeros(()).expand(counts.shape))
    assert_within("sum", parts[0], sums, eps * values.abs().nansum(1))
    # A mean that errs by eps of the largest value moves each deviation as much.
    off = eps * values.abs().nan_to_num().amax(1)
    bound = eps * deviations + 2 * off * (counts * deviations).sqrt() + counts * off.square()
    assert_within("deviations", parts[1], deviations, bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", ["transposed", "cropped"])
def test_views(weight, dtype, device):
    """Runs of channels in wider pixels; a filter that is another one's transpose, as of a linear layer's gradient."""
    case = Case("24 to 40", (2, 24, 3, 5), 40, (1, 1))
    p, plan = as_problem(case), for_layout(WHOLE, "channels_last", dtype)
    x, dy = image((2, 40, 3, 5), dtype, device)[:, 8:32], image((2, 56, 3, 5), dtype, device)[:, :40]
    if weight == "transposed":
        w = torch.randn(24, 40).to(device, dtype).t()[:, :, None, None]
    else:
        w = torch.randn(40, 32, 1, 1).to(device, dtype)[:, 8:]
    check(p, Direction.FORWARD, x, w, plan)
    check(p, Direction.INPUT_GRAD, dy, w, plan)
    check(p, Direction.WEIGHT_GRAD, dy, x, plan)


@pytest.mark.parametrize("inputs, outputs", [(20, 10), (20, 1), (1, 24), (40, 24)])
def test_one_pixel(inputs, outputs, device):
    """A single row has any stride: its channels need not be whole units of 16 bytes."""
    case = Case("row", (1, inputs, 1, 1), outputs, (1, 1))
    p = as_problem(case)
    plan = replace(for_layout(WHOLE, "channels_last", torch.float16), block_m=16)
    padded = torch.randn(outputs, -(-inputs // 8) * 8).to(device, torch.float16)
    w = padded[:, :inputs, None, None]
    check(p, Direction.FORWARD, image(case.input, torch.float16, device), w, plan)


@pytest.mark.parametrize("layout", FORMATS)
def test_what_is_not_finite_stays_where_it_is(layout, device):
    """In pixels and channels at the ends, beside what descriptors fill with zeros."""
    case = Case("24 to 40", (2, 24, 3, 8), 40, (1, 1))
    p, plan = as_problem(case), for_layout(WHOLE, layout, torch.float16)
    x, w, dy = operands(case, torch.float16, device, layout)
    x[-1, -1, -1, -1], x[0, 0, 0, 0] = float("nan"), float("inf")
    w[-1, -1] = float("inf")
    last = layout == "channels_last"
    for direction, first, second in ((Direction.FORWARD, x, w), (Direction.INPUT_GRAD, dy, w)):
        actual = run(prepared_for(p, direction, first, second, last, plan=plan), first, second)[0].cpu()
        value = truth(p, direction, first, second)
        assert torch.equal(actual.isnan(), value.isnan()) and torch.equal(actual.isinf(), value.isinf())
    plan = for_layout(WHOLE, layout, torch.float16, Direction.WEIGHT_GRAD)
    actual = run(prepared_for(p, Direction.WEIGHT_GRAD, dy, x, True, plan=plan), dy, x)[0].cpu()
    value = truth(p, Direction.WEIGHT_GRAD, dy, x)
    assert torch.equal(actual.isnan(), value.isnan()) and torch.equal(actual.isinf(), value.isinf())


# ---- plans ---------------------------------------------------------------------------------------------------------


def found(case: Case, direction: Direction = Direction.FORWARD, device=H100, **of) -> list[ConvPlan]:
    return list(gemm.candidates(as_problem(case), direction, Operands(**{"dtype": "float16", **of}), device))


LAYER = Case("layer of ResNet-50", (32, 256, 56, 56), 64, (1, 1))


def test_only_products_are_served():
    assert found(LAYER)
    assert not found(LAYER, device=A100)
    assert not found(replace(LAYER, kernel=(3, 3)))
    assert not found(replace(LAYER, stride=2))
    assert not found(replace(LAYER, padding=1))
    assert not found(replace(LAYER, groups=2))
    assert not found(replace(LAYER, input=(0, 256, 56, 56))) and not found(replace(LAYER, input=(32, 0, 56, 56)))
    assert not found(LAYER, first=Layout.NHWC_STRIDED)
    assert not found(LAYER, second=Layout.STRIDED)
    assert not found(LAYER, output=Layout.NCHW)
    assert not found(LAYER, dtype="float32", precision="ieee")
    planes = {"first": Layout.NCHW, "output": Layout.NCHW}
    assert all(plan.box == (1, 1, plan.block_m) for plan in found(LAYER, **planes))
    assert found(LAYER, **planes) and not found(replace(LAYER, input=(32, 256, 14, 14)), **planes)


def test_small_grids_are_split_and_large_ones_are_not():
    assert all(plan.splits == 1 for plan in found(LAYER))
    one_image = Case("last stage, batch 1", (1, 2048, 7, 7), 512, (1, 1))
    assert any(plan.splits > 1 for plan in found(one_image))
    assert all(plan.splits > 1 for plan in found(LAYER, Direction.WEIGHT_GRAD))


@pytest.mark.parametrize("direction", Direction, ids=lambda direction: direction.value)
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("planes", [False, True])
def test_tiles_and_steps_cover_the_work(planes, batch, direction, device):
    case = Case("layer", (batch, 264, 28, 28), 136, (1, 1))
    p = as_problem(case)
    image_layout = Layout.NCHW if planes else Layout.NHWC
    names = ("first", "second") if direction is Direction.WEIGHT_GRAD else ("first", "output")
    plans = found(case, direction, **dict.fromkeys(names, image_layout))
    assert 0 < len(plans) <= 16
    for plan in plans:
        done = sum(tiles * steps for tiles, steps in gemm.tiles(p, direction, plan))
        done *= plan.block_m * plan.block_n * plan.block_k
        assert done >= p.N * p.H * p.W * p.C * p.K
        assert len(gemm.tiles(p, direction, plan)) == plan.splits


def test_every_candidate_computes(device):
    """Every tile that plans choose, as large as they are, on a problem that just fills them."""
    case = Case("all tiles", (2, 72, 15, 12), 264, (1, 1))
    p = as_problem(case)
    x, w, dy = operands(case, torch.float16, device, "channels_last")
    for direction, first, second in (
        (Direction.FORWARD, x, w),
        (Direction.INPUT_GRAD, dy, w),
        (Direction.WEIGHT_GRAD, dy, x),
    ):
        for plan in found(case, direction):
            check(p, direction, first, second, plan)
