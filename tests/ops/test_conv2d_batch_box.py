"""The weight gradient by boxes of one pixel of many images, with tiles smaller than its own, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gpukern.conv import reference
from gpukern.conv.families.tma_wgrad import plan as batch_box
from gpukern.conv.launch import prepared_for, run
from gpukern.conv.plan import ConvPlan, Direction, Layout, Operands, Variant
from gpukern.conv.problem import ConvProblem
from gpukern.runtime.device import A100, H100
from gpukern.runtime.precision import conv_precision
from tests.numerics import assert_within, sum_bound, uses_tf32
from tests.ops.conv_cases import Case, as_problem

pytestmark = pytest.mark.usefixtures("poisoned")

SMALL = ConvPlan(Variant.BATCH_BOX, 32, 32, 16, num_warps=4, num_stages=2)
#: Columns are those of three neighbouring taps.
THREE_TAPS = replace(SMALL, block_n=3 * 16)

#: The batch is never a multiple of the 16 images of a box, and channels never of a tile.
CASES = (
    Case("3x3", (20, 24, 5, 4), 40, (3, 3), padding=1),
    Case("1x1 stride 2", (18, 8, 5, 6), 24, (1, 1), stride=2),
    Case("stride 2, odd", (17, 16, 7, 6), 8, (3, 3), stride=2, padding=1),
    Case("stride 3 by 2", (5, 40, 7, 8), 24, (3, 4), stride=(3, 2), padding=(0, 1)),
    Case("stride beyond the kernel", (9, 16, 7, 9), 24, (2, 2), stride=4),
    Case("dilation 2", (20, 8, 6, 5), 16, (3, 3), padding=2, dilation=2),
    Case("stride 2, dilation 3 by 2", (7, 24, 9, 8), 16, (3, 2), stride=2, padding=(3, 1), dilation=(3, 2)),
    Case("lopsided", (11, 8, 5, 6), 24, (4, 2), padding="same"),
    Case("lopsided, dilated", (11, 8, 5, 6), 24, (2, 4), padding="same", dilation=3),
    Case("padding beyond the kernel", (6, 8, 3, 4), 16, (2, 2), padding=4),
    Case("taps that meet no pixel", (19, 8, 3, 2), 16, (3, 3), padding=4, dilation=4),
    Case("1x6, dilation 3, stride 2", (19, 8, 3, 11), 16, (1, 6), stride=(1, 2), padding=(0, 7), dilation=(1, 3)),
    Case("72 to 40", (17, 72, 3, 2), 40, (3, 3), padding=1),
)


def image(shape, dtype, device) -> torch.Tensor:
    return torch.randn(shape).to(device, dtype).contiguous(memory_format=torch.channels_last)


def operands(case: Case, dtype, device) -> tuple[ConvProblem, torch.Tensor, torch.Tensor]:
    """The problem, dy and x."""
    p = as_problem(case)
    return p, image((p.N, p.K, p.P, p.Q), dtype, device), image(case.input, dtype, device)


def check(p: ConvProblem, grad: torch.Tensor, input: torch.Tensor, plan: ConvPlan) -> torch.Tensor:
    plan = replace(plan, precision=conv_precision(grad.dtype))
    actual, _ = run(prepared_for(p, Direction.WEIGHT_GRAD, grad, input, True, plan=plan), grad, input)
    value, absolute = truth(p, grad, input), truth(p, grad.abs(), input.abs())
    tf32 = uses_tf32(grad.dtype, plan.precision)
    assert_within(str(plan), actual, value, sum_bound(value, absolute, p.N * p.P * p.Q, grad.dtype, tf32=tf32))
    return actual


def truth(p: ConvProblem, grad: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    return reference.conv2d_weight_grad(p, grad.double().cpu(), input.double().cpu(), False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_any_geometry(case, device):
    arguments = operands(case, torch.float16, device)
    check(*arguments, SMALL)
    if case.kernel[1] % 3 == 0:
        check(*arguments, THREE_TAPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [CASES[2], CASES[6]], ids=lambda case: case.name)
def test_other_dtypes(case, dtype, device):
    check(*operands(case, dtype, device), SMALL)


@pytest.mark.parametrize(
    "case, splits", [(CASES[0], 3), (CASES[1], 7), (CASES[10], 5)], ids=lambda v: getattr(v, "name", v)
)
def test_splits(case, splits, device):
    """Shares that are not even, that begin within a row, and that are empty."""
    plan = THREE_TAPS if case.kernel[1] == 3 else SMALL
    arguments = (*operands(case, torch.float16, device), replace(plan, splits=splits))
    assert torch.equal(check(*arguments), check(*arguments))


def test_crops_of_larger_images(device):
    case = CASES[2]
    p, dy, x = operands(case, torch.float16, device)
    large_x, large_dy = (image((n + 1, c + 16, h + 2, w + 3), x.dtype, device) for n, c, h, w in (x.shape, dy.shape))
    (N, C, H, W), (_, K, P, Q) = x.shape, dy.shape
    check(p, large_dy[1:, 8 : K + 8, 1 : P + 1, :Q], large_x[:N, :C, 2:, 3:], SMALL)
    assert large_x[:N, :C, 2:, 3:].shape == (N, C, H, W)


def test_what_is_not_finite_stays_where_it_is(device):
    """In the last image, beside those that descriptors fill with zeros, and in a pixel that no tap reads."""
    case = Case("stride 2", (17, 24, 6, 6), 40, (1, 1), stride=2)
    p, dy, x = operands(case, torch.float16, device)
    x[3, :, 1, 1], x[-1, 2, 4, 4], dy[-1, 5, -1, -1] = float("nan"), float("nan"), float("inf")
    actual, _ = run(prepared_for(p, Direction.WEIGHT_GRAD, dy, x, True, plan=SMALL), dy, x)
    value = truth(p, dy, x)
    assert torch.equal(actual.cpu().isnan(), value.isnan()) and torch.equal(actual.cpu().isinf(), value.isinf())


# ---- plans ---------------------------------------------------------------------------------------------------------


def found(case: Case, direction: Direction = Direction.WEIGHT_GRAD, device=H100, **of) -> list[ConvPlan]:
    return list(batch_box.candidates(as_problem(case), direction, Operands(**{"dtype": "float16", **of}), device))


LAYER = Case("layer of ResNet-50", (64, 128, 28, 28), 128, (3, 3), stride=2, padding=1)


def test_what_is_served():
    assert found(LAYER) and found(LAYER, first=Layout.NHWC_STRIDED, second=Layout.NHWC_STRIDED)
    assert not found(LAYER, Direction.FORWARD)
    assert not found(LAYER, device=A100)
    assert not found(LAYER, first=Layout.NCHW)
    assert not found(LAYER, output=Layout.NCHW)
    assert not found(LAYER, dtype="float32", precision="ieee")
    assert not found(replace(LAYER, groups=2))
    assert not found(replace(LAYER, input=(31, 128, 28, 28)))
    assert not found(replace(LAYER, input=(32, 0, 28, 28)))


@pytest.mark.parametrize("batch, images", [(32, 32), (64, 64), (96, 32), (100, 64), (128, 64)])
def test_boxes_hold_as_many_images_as_waste_none(batch, images):
    assert {plan.block_k for plan in found(replace(LAYER, input=(batch, 128, 28, 28)))} == {images}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_steps_are_those_of_taps_inside_the_image(case):
    """Counted one by one; of three taps together, from the first column that one of them reads to the last."""
    p = as_problem(case)
    boxes = -(-p.N // SMALL.block_k)
    for plan in (SMALL, THREE_TAPS)[: 2 if p.S % 3 == 0 else 1]:
        taps = batch_box.together(plan)
        steps = []
        for r in range(p.R):
            rows = [i for i in range(p.P) if 0 <= i * p.stride[0] + r * p.dilation[0] - p.padding[0] < p.H]
            for s in range(0, p.S, taps):
                read = [
                    {j for j in range(p.Q) if 0 <= j * p.stride[1] + t * p.dilation[1] - p.padding[2] < p.W}
                    for t in range(s, s + taps)
                ]
                cols = set().union(*read)
                steps.append(boxes * len(rows) * (max(cols) + 1 - min(cols) if cols else 0))
        channel_tiles = -(-p.K // plan.block_m) * -(-p.C // (plan.block_n // taps))
        for splits in (1, 3):
            tiles = batch_box.tiles(p, Direction.WEIGHT_GRAD, replace(plan, splits=splits))
            assert {count for count, _ in tiles} == {channel_tiles}
            assert [sum(n for _, n in tiles[i : i + splits]) for i in range(0, len(tiles), splits)] == steps


def test_every_candidate_computes(device):
    tiles = set()
    for case in (Case("one", (33, 136, 2, 1), 72, (2, 1)), Case("three", (33, 72, 2, 3), 72, (2, 3), padding=1)):
        p, dy, x = operands(case, torch.float16, device)
        for plan in found(case):
            check(p, dy, x, plan)
            tiles.add((plan.block_m, plan.block_n))
    assert len(tiles) >= 8
