"""Plans as plain functions, and the promises about alignment, checked against every offset."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from gpukern.ops._conv2d.plan import MAX_WARPS, Direction, Variant, plan
from gpukern.ops._conv2d.prepare import alignment, dense_strides, is_channels_last
from gpukern.ops._conv2d.problem import conv_problem, same_padding
from gpukern.ops._image import strides_of
from gpukern.runtime.device import A100, H100
from gpukern.runtime.tensors import memory_format_of
from tests.ops.conv_cases import CASES


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


def test_variants():
    assert plan(RESNET_3X3, Direction.FORWARD, "float16", "ieee", H100).variant is Variant.TAPS
    assert plan(STEM, Direction.FORWARD, "float16", "ieee", H100).variant is Variant.FLAT
    # The stem's input gradient sums over 64 channels.
    assert plan(STEM, Direction.INPUT_GRAD, "float16", "ieee", H100).variant is Variant.TAPS
    for direction in Direction:
        assert plan(DEPTHWISE, direction, "float16", "ieee", H100).variant is Variant.DIRECT


def test_large_problems_get_large_tiles_and_small_ones_fill_the_chip():
    large = plan(problem(128, 128, 56, 56, 128, 3, 3, padding=1), Direction.FORWARD, "float16", "ieee", H100)
    assert (large.block_m, large.block_n, large.block_k) == (128, 128, 64)
    assert plan(problem(1, 64, 1, 1, 16384, 1, 1), Direction.FORWARD, "float16", "ieee", H100).block_m == 16
    small = plan(problem(1, 512, 7, 7, 512, 3, 3, padding=1), Direction.FORWARD, "float16", "ieee", H100)
    assert small.block_m * small.block_n <= 32 * 32


def test_weight_gradient_splits_long_sums_over_the_chip():
    p = problem(128, 64, 56, 56, 64, 3, 3, padding=1)
    choice = plan(p, Direction.WEIGHT_GRAD, "float16", "ieee", H100)
    assert 9 * choice.splits >= H100.sm_count
    tiny = plan(problem(1, 64, 4, 4, 64, 3, 3, padding=1), Direction.WEIGHT_GRAD, "float16", "ieee", H100)
    assert tiny.splits == 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_plan_is_launchable(case):
    padding = case.padding if not isinstance(case.padding, str) else 1
    pair = lambda v: (v, v) if isinstance(v, int) else v  # noqa: E731
    vertical, horizontal = pair(padding)
    p = conv_problem(
        case.input, case.weight, None, pair(case.stride), (vertical, vertical, horizontal, horizontal),
        pair(case.dilation), case.groups,
    )  # fmt: skip
    kinds = (("float32", "ieee"), ("float32", "tf32"), ("float16", "ieee"), ("bfloat16", "ieee"))
    for direction, (dtype, precision), device in itertools.product(Direction, kinds, (A100, H100)):
        choice = plan(p, direction, dtype, precision, device)
        assert choice.num_warps <= MAX_WARPS and choice.splits >= 1
        for size in (choice.block_m, choice.block_n, choice.block_k):
            assert size & (size - 1) == 0
        if choice.variant is not Variant.DIRECT:
            # The smallest tile a tensor core multiplies.
            assert min(choice.block_m, choice.block_n, choice.block_k) >= 16
            itemsize = 4 if dtype == "float32" else 2
            stage = (choice.block_m + choice.block_n) * choice.block_k * itemsize
            assert stage * choice.num_stages <= device.shared_memory
        assert plan(p, direction, dtype, precision, device) is choice


def test_plans_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan(RESNET_3X3, Direction.FORWARD, "float16", "ieee", H100).block_m = 1


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


LAYOUTS = tuple(_layouts())


@pytest.mark.parametrize("tensor", [t for _, t in LAYOUTS], ids=[name for name, _ in LAYOUTS])
def test_layouts_are_torchs(tensor):
    """The layout rules that launches are prepared with, on strides alone, against PyTorch's on tensors."""
    assert is_channels_last(tensor.shape, tensor.stride()) == (memory_format_of(tensor) is torch.channels_last)
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
