"""What only the block-diagonal kernel of grouped convolutions has; ``test_conv2d_forced`` tries it as all others."""

from __future__ import annotations

import itertools

import pytest
import torch

from gpukern.conv import launch, reference
from gpukern.conv.families.grouped import plan as grouped
from gpukern.conv.plan import Direction, Layout, Operands
from gpukern.conv.problem import ConvProblem
from gpukern.conv.request import operands_of
from gpukern.runtime.device import A100, EMULATED, H100, L4
from tests.numerics import assert_within, sum_bound
from tests.ops.conv_cases import Case, as_problem

pytestmark = pytest.mark.usefixtures("poisoned")


def tensors(p: ConvProblem, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """x and w, channels_last."""
    sizes = (p.N, p.C, p.H, p.W), (p.K, p.group_inputs, p.R, p.S)
    x, w = (torch.randn(s).to(device, torch.float16).contiguous(memory_format=torch.channels_last) for s in sizes)
    return x, w


@pytest.mark.parametrize("channels, groups", [(2, 20), (4, 10), (8, 5), (16, 3)])
def test_filters_of_any_layout_in_every_tile(channels, groups, device):
    """A tile's last groups are not there, and what a tap is apart in the filter is one element or a whole plane."""
    p = as_problem(Case("", (2, groups * channels, 6, 7), groups * channels, (3, 3), padding=1, groups=groups))
    x, w = tensors(p, device)
    doubles = [t.double().cpu() for t in (x, w)]
    value, absolute = (
        reference.conv2d(p, *operands, None, None, "none", 0.0) for operands in (doubles, [t.abs() for t in doubles])
    )
    bound = sum_bound(value, absolute, 9 * channels, torch.float16)
    for filter in (w, w.contiguous()):
        strides = x.stride(), filter.stride(), value.contiguous(memory_format=torch.channels_last).stride()
        operands = operands_of(p, Direction.FORWARD, strides, True, x.dtype, "ieee")
        found = list(grouped.candidates(p, Direction.FORWARD, operands, EMULATED))
        assert len(found) == (1 if channels == 2 else 2)
        for choice in found:
            prepared = launch.prepared_for(p, Direction.FORWARD, x, filter, True, plan=choice)
            assert_within(str(choice), launch.run(prepared, x, filter)[0], value, bound)


def test_no_group_sees_anothers_nan(device):
    """The zeros of other groups would make a NaN of an infinity: such a tile is computed group by group."""
    p = as_problem(Case("", (2, 40, 6, 7), 40, (3, 3), padding=1, groups=10))
    x, w = tensors(p, device)
    x[0, 5, 3, 3], x[1, 21, 2, 2], w[3, 1, 0, 2] = float("nan"), float("-inf"), float("inf")
    value = reference.conv2d(p, x.double().cpu(), w.double().cpu(), None, None, "none", 0.0)
    operands = Operands("float16")
    for choice in grouped.candidates(p, Direction.FORWARD, operands, EMULATED):
        actual, _ = launch.run(launch.prepared_for(p, Direction.FORWARD, x, w, True, plan=choice), x, w)
        assert torch.equal(actual.cpu().isnan(), value.isnan())
        assert torch.equal(actual.cpu().double().clamp(-1, 1)[value.isinf()], value.sign()[value.isinf()])
        assert 0 < value.isnan().sum() < value.isinf().sum() < value.numel() / 2


def found(group: tuple[int, int], direction=Direction.FORWARD, device=H100, dtype="float16", **operands):
    return list(grouped.candidates(layer(group), direction, Operands(dtype, **operands), device))


def layer(group: tuple[int, int]) -> ConvProblem:
    """32 groups of so many input and output channels."""
    inputs, outputs = group
    return as_problem(Case("", (32, 32 * inputs, 28, 28), 32 * outputs, (3, 3), padding=1, groups=32))


def test_tiles_hold_whole_groups_and_fit():
    for device, group, direction in itertools.product(
        (A100, H100, L4), ((4, 4), (8, 8), (16, 4)), (Direction.FORWARD, Direction.INPUT_GRAD)
    ):
        choices = found(group, direction, device)
        assert choices
        for choice in choices:
            columns, reduction = group[::-1] if direction is Direction.FORWARD else group
            assert choice.block_n // columns == choice.block_k // reduction
            assert min(choice.block_n, choice.block_k) >= 16
            operands_of_a_stage = choice.block_k * (choice.block_m + choice.block_n) * 2
            assert choice.num_stages * operands_of_a_stage <= device.shared_memory


def test_work_of_a_tile():
    """A tile of 32 × 32 channels and 9 taps: an eighth of its products is needed."""
    [(programs, steps)] = grouped.tiles(layer((4, 4)), Direction.FORWARD, found((4, 4))[0])
    assert programs * steps == 32 * 28 * 28 // 128 * (128 // 32) * 9


def test_what_it_leaves_to_others():
    assert not found((4, 6)) and not found((32, 32)) and not found((1, 4))
    assert not found((4, 4), Direction.WEIGHT_GRAD) and not found((4, 4), first=Layout.NCHW)
    assert not found((4, 4), dtype="float32") and found((4, 4), dtype="float32", precision="tf32")
