"""Plans as plain functions, and the promises about alignment, checked against every offset."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from gpukern.conv.cost import is_elementwise
from gpukern.conv.families.registry import FAMILIES, family_of
from gpukern.conv.layouts import alignment
from gpukern.conv.plan import ConvPlan, Direction, Layout, Operands, Variant
from gpukern.conv.planner import heuristic_plan, only_measured, ranking
from gpukern.conv.problem import conv_problem, same_padding
from gpukern.ops._images import strides_of
from gpukern.runtime.device import A100, B200, DEVICES, EMULATED, H100, L4, RTX_5090
from gpukern.runtime.strides import dense_strides, is_channels_last
from tests.ops.conv_cases import CASES, as_problem

FORWARD, INPUT_GRAD, WEIGHT_GRAD = Direction
HALF = Operands("float16")
#: Kernels that read boxes with the copy engine, which came with Hopper.
BY_DESCRIPTOR = {variant for family in FAMILIES if family.uses_descriptors for variant in family.variants}
BOXES = {Variant.BOX, Variant.STEM, Variant.WARP_SPECIALIZED}


def problem(N, C, H, W, K, R, S, stride=1, padding=0, groups=1):
    return conv_problem((N, C, H, W), (K, C // groups, R, S), None, (stride, stride), (padding,) * 4, (1, 1), groups)


RESNET_3X3 = problem(32, 128, 28, 28, 128, 3, 3, padding=1)
STEM = problem(32, 3, 224, 224, 64, 7, 7, stride=2, padding=3)
DEPTHWISE = problem(32, 96, 56, 56, 96, 3, 3, padding=1, groups=96)


def test_output_size_is_the_lectures():
    assert (problem(1, 3, 32, 32, 10, 5, 5, padding=2).P, problem(1, 1, 7, 7, 1, 3, 3, stride=2).P) == (32, 3)


def test_same_padding_puts_the_odd_pixel_last():
    assert same_padding((3, 4), (1, 1)) == (1, 1, 1, 2)
    assert same_padding((2, 2), (3, 1)) == (1, 2, 0, 1)


# ---- which kernel --------------------------------------------------------------------------------------------------


def variants(p, direction, operands=HALF, device=H100) -> set[Variant]:
    return {ranked.plan.variant for ranked in ranking(p, direction, operands, device)}


def test_few_channels_are_joined_with_their_taps():
    assert Variant.FLAT in variants(STEM, FORWARD) and Variant.TAPS not in variants(STEM, FORWARD)
    # The stem's input gradient sums over 64 channels.
    assert Variant.TAPS in variants(STEM, INPUT_GRAD)
    assert Variant.TAPS in variants(RESNET_3X3, FORWARD)


@pytest.mark.parametrize("direction", Direction)
def test_few_channels_a_group_are_multiplied_element_by_element(direction):
    elementwise = {variant for family in FAMILIES for variant in family.elementwise}
    for device in (A100, H100):
        assert is_elementwise(heuristic_plan(DEPTHWISE, direction, HALF, device))
        assert not variants(RESNET_3X3, direction, device=device) & elementwise


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("p", [RESNET_3X3, STEM, DEPTHWISE, problem(64, 256, 14, 14, 1024, 1, 1)], ids=str)
def test_before_hopper_nothing_is_read_by_descriptors(p, direction):
    for device, dtype in itertools.product((A100, L4), ("float16", "float32")):
        assert not variants(p, direction, Operands(dtype, "tf32" if dtype == "float32" else "ieee"), device) & (
            BY_DESCRIPTOR
        )


def test_on_hopper_large_layers_are_read_by_descriptors():
    assert heuristic_plan(RESNET_3X3, FORWARD, HALF, H100).variant in BY_DESCRIPTOR
    assert heuristic_plan(RESNET_3X3, INPUT_GRAD, HALF, H100).variant in BY_DESCRIPTOR
    for direction in Direction:
        assert heuristic_plan(problem(64, 256, 14, 14, 1024, 1, 1), direction, HALF, H100).variant in BY_DESCRIPTOR


def test_blackwell_without_wgmma_reads_by_descriptors_into_registers():
    """The copy engine is there; sums must leave registers for operands, and Hopper's warp-specialised kernel is not."""
    found = [
        ranked.plan
        for operands, direction in itertools.product(
            (HALF, Operands("float32", "tf32"), Operands("float32", "ieee")), Direction
        )
        for ranked in ranking(RESNET_3X3, direction, operands, RTX_5090)
    ]
    assert {Variant.BOX, Variant.BATCH_BOX} < {choice.variant for choice in found}
    assert Variant.WARP_SPECIALIZED not in {choice.variant for choice in found}
    sums = {
        (choice.precision, choice.block_m * choice.block_n // (32 * choice.num_warps))
        for choice in found
        if choice.variant in BY_DESCRIPTOR
    }
    assert max(count for precision, count in sums if precision != "tf32x3") == 96
    assert max(count for precision, count in sums if precision == "tf32x3") == 32
    # Steps of the gather are as short as before Hopper, for the same reason.
    steps = {
        device: max(
            c.plan.block_k for c in ranking(RESNET_3X3, FORWARD, HALF, device) if c.plan.variant is Variant.TAPS
        )
        for device in (L4, H100, RTX_5090)
    }
    assert steps == {L4: 32, H100: 64, RTX_5090: 32}


def test_rows_that_no_descriptor_describes_are_gathered():
    odd = Operands("float16", "ieee", Layout.CHANNELS, Layout.CHANNELS, Layout.CHANNELS)
    assert not variants(RESNET_3X3, FORWARD, odd) & BY_DESCRIPTOR


def test_large_problems_get_large_tiles_and_small_ones_fill_the_chip():
    large = heuristic_plan(problem(128, 128, 56, 56, 128, 3, 3, padding=1), FORWARD, HALF, H100)
    assert large.block_m * large.block_n >= 128 * 128
    for direction in Direction:
        small = ranking(problem(1, 512, 7, 7, 512, 3, 3, padding=1), direction, HALF, H100)
        assert next(r for r in small if not only_measured(r.plan)).cost.tiles >= H100.sm_count / 4


def test_weight_gradient_splits_long_sums_over_the_chip():
    p = problem(128, 64, 56, 56, 64, 3, 3, padding=1)
    best = next(r for r in ranking(p, WEIGHT_GRAD, HALF, H100) if not only_measured(r.plan))
    assert best.plan.splits > 1 and best.cost.tiles >= H100.sm_count
    assert heuristic_plan(problem(1, 64, 4, 4, 64, 3, 3, padding=1), WEIGHT_GRAD, HALF, H100).splits == 1


# ---- all candidates ------------------------------------------------------------------------------------------------

KINDS = (("float32", "ieee"), ("float32", "tf32"), ("float16", "ieee"), ("bfloat16", "ieee"))
LAYOUTS_OF_ALL = (Layout.NHWC, Layout.NCHW, Layout.STRIDED)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_plan_is_launchable(case):
    p = as_problem(case)
    devices = (A100, H100, L4, B200, RTX_5090, EMULATED)
    for direction, kind, layout, device in itertools.product(Direction, KINDS, LAYOUTS_OF_ALL, devices):
        operands = Operands(*kind, layout, layout, layout)
        ranked = ranking(p, direction, operands, device)
        for each in ranked:
            assert fits(each.plan, operands, device), each.plan
            tiles = family_of(each.plan).tiles(p, direction, each.plan)
            assert all(count >= 0 and steps >= 0 for count, steps in tiles)
            assert each.seconds >= each.cost.seconds >= 0
        assert [r.seconds for r in ranked] == sorted(r.seconds for r in ranked)
        assert len({r.plan for r in ranked}) == len(ranked)
        chosen = heuristic_plan(p, direction, operands, device)
        assert chosen == next(r.plan for r in ranked if not only_measured(r.plan))
        assert heuristic_plan(p, direction, operands, device) is chosen


def fits(choice: ConvPlan, operands: Operands, device) -> bool:
    """Sizes that Triton takes, and buffers that the device has."""
    if choice.splits < 1 or choice.num_warps not in (1, 2, 4, 8, 16) or choice.num_stages < 1:
        return False
    if is_elementwise(choice):
        return True
    # A tile of the batch box may hold three taps side by side.
    columns = choice.block_n // 3 if choice.variant is Variant.BATCH_BOX and choice.block_n % 3 == 0 else choice.block_n
    sizes = choice.block_m, columns, choice.block_k
    # The smallest tile a tensor core multiplies.
    if any(size & (size - 1) for size in sizes) or min(sizes) < 16:
        return False
    if choice.variant in BOXES and math.prod(choice.box) != choice.block_m:
        return False
    stage = (choice.block_m + choice.block_n) * choice.block_k * operands.itemsize
    return stage * choice.num_stages <= device.shared_memory


def test_what_only_a_gpu_can_show_is_not_chosen():
    assert only_measured(ConvPlan(Variant.TAPS, 128, 128, 32, num_warps=8, num_stages=4))
    assert not only_measured(ConvPlan(Variant.BOX, 128, 128, 64, num_warps=8, num_stages=3))
    p = problem(128, 128, 56, 56, 128, 3, 3, padding=1)
    assert any(only_measured(r.plan) for r in ranking(p, FORWARD, HALF, H100))


@pytest.mark.parametrize("name", DEVICES)
def test_tensors_without_runs_are_copied_where_that_pays(name):
    planes = Operands("float16", "ieee", Layout.NCHW, Layout.NCHW, Layout.NCHW)
    for direction in Direction:
        best = ranking(RESNET_3X3, direction, planes, DEVICES[name])
        assert len({r.plan.pack for r in best}) > 1
        assert not any(any(r.plan.pack) for r in ranking(RESNET_3X3, direction, HALF, DEVICES[name]))


def test_float32_in_full_may_be_three_products_of_halves():
    """On the tensor cores; where TF32 is allowed or the operands are halves, nobody needs that."""
    found = {r.plan.precision for r in ranking(RESNET_3X3, FORWARD, Operands("float32", "ieee"), H100)}
    assert "tf32x3" in found
    for operands in (Operands("float32", "tf32"), HALF):
        assert {r.plan.precision for r in ranking(RESNET_3X3, FORWARD, operands, H100)} == {operands.precision}


def test_plans_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        heuristic_plan(RESNET_3X3, FORWARD, HALF, H100).block_m = 1


def test_a_plan_says_what_it_is():
    box = ConvPlan(Variant.BOX, 128, 64, 64, 4, 1, splits=2, box=(2, 8, 8), pack=(True, False, True))
    assert str(box) == "box 128×64×64 (box 2×8×8), 4 warps, 2 splits, 2 copies"
    assert str(ConvPlan(Variant.TAPS, 64, 32, 32, 4, 3)) == "taps 64×32×32, 4 warps, 3 stages"


# ---- layouts -------------------------------------------------------------------------------------------------------


def _layouts():
    base = torch.empty(3, 24, 5, 8)
    yield "NCHW", base
    yield "channels_last", base.contiguous(memory_format=torch.channels_last)
    yield "channel slice", torch.empty(3, 5, 8, 40).permute(0, 3, 1, 2)[:, 8:32]
    yield "odd channel slice", torch.empty(3, 5, 8, 41).permute(0, 3, 1, 2)[:, :24]
    yield "every second row", torch.empty(3, 10, 8, 24).permute(0, 3, 1, 2)[:, :, ::2]
    yield "expanded batch", torch.empty(1, 5, 8, 24).permute(0, 3, 1, 2).expand(3, 24, 5, 8)
    yield "one pixel", torch.empty(3, 24, 1, 1)
    yield "one channel", torch.empty(3, 1, 5, 8)
    yield "one channel in channels_last", torch.empty(3, 1, 5, 8, memory_format=torch.channels_last)
    yield "one pixel in channels_last", torch.empty(3, 24, 1, 1, memory_format=torch.channels_last)
    yield "one column", torch.empty(3, 1, 5, 1)
    yield "one number an image", torch.empty(3, 1, 1, 1)
    yield "one channel of several", torch.empty(3, 5, 8, 40).permute(0, 3, 1, 2)[:, :1]
    yield "swapped", torch.empty(1, 8, 1, 24).permute(0, 3, 2, 1)


LAYOUTS = tuple(_layouts())


@pytest.mark.parametrize("tensor", [t for _, t in LAYOUTS], ids=[name for name, _ in LAYOUTS])
def test_layouts_are_torchs(tensor):
    """The layout rules that launches are prepared with, on strides alone, against PyTorch's on tensors."""
    theirs = torch.nn.functional.max_pool2d(tensor, 1)  # is laid out as torch takes its input to be
    assert is_channels_last(tensor.shape, tensor.stride()) == is_channels_last(theirs.shape, theirs.stride())
    for channels_last, memory_format in ((True, torch.channels_last), (False, torch.contiguous_format)):
        for shape in (tensor.shape, (0, *tensor.shape[1:])):
            expected = torch.empty(shape, memory_format=memory_format)
            assert torch.empty_strided(shape, dense_strides(shape, channels_last)).stride() == expected.stride()


@pytest.mark.parametrize("name, tensor", LAYOUTS, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("run", [1, 4, 6, 8, 12, 24])
def test_alignment_divides_the_start_of_every_run(name, tensor, run):
    N, C, H, W = tensor.shape
    sn, sc, sh, sw = strides = strides_of(tensor.shape, tensor.stride())
    claim = alignment(strides, 1, run)
    starts = [
        n * sn + h * sh + w * sw + c * sc
        for n, h, w, c in itertools.product(range(N), range(H), range(W), range(0, C, run))
    ]
    assert claim in (1, 2, 4, 8, 16) and run % claim == 0
    if claim > 1:
        assert sc == 1 and all(start % claim == 0 for start in starts)
    if name == "channels_last" and run == 24:
        assert claim == 8, "a claim too low would cost the wide loads"
