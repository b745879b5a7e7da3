"""How batch norm walks over its operands, and into how many programs it is cut."""

from __future__ import annotations

import pytest
import torch

from gpukern.ops._batch_norm.planner import plan
from gpukern.ops._batch_norm.problem import walk
from gpukern.runtime.device import EMULATED, H100
from tests.ops.batch_norm_calls import SHAPES


def strides(shape, layout: torch.memory_format) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").contiguous(memory_format=layout).stride()


def test_walks_join_what_lies_together():
    shape = (32, 40, 28, 28)
    last, planes = (strides(shape, layout) for layout in (torch.channels_last, torch.contiguous_format))
    path = walk(shape, (last, last))
    assert (path.rows, path.height, path.inner, path.channels_run, path.channel_align) == (1, 1, 32 * 784, True, 8)
    path = walk(shape, (planes,))
    assert (path.rows, path.height, path.inner, path.channels_run, path.pixel_align) == (1, 32, 784, False, 16)
    path = walk(shape, (planes, last))  # no dimension is dense in both
    assert (path.inner, path.channel_align, path.pixel_align) == (784, 1, 1)
    path = walk(shape, (last, (0, 0, 0, 0)))  # the gradient of a sum
    assert (path.inner, path.channel_align) == (32 * 784, 8)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_few_channels_keep_a_gpu_busy(layout):
    for shape in ((32, 64, 56, 56), (128, 3, 224, 224), (32, 2048, 7, 7)):
        chosen = plan(walk(shape, (strides(shape, layout),)), 2, H100, True)
        assert chosen.splits * chosen.channel_tiles >= 2 * H100.sm_count
        assert (chosen.splits - 1) * chosen.steps_per_split < chosen.steps <= chosen.splits * chosen.steps_per_split
    small = plan(walk((128, 4096), ((4096, 1),)), 2, H100, True)
    assert small.splits == 1  # one launch


def test_emulated_shapes_take_both_ways():
    """The shapes above reach what they are there for."""

    def splits(name, layout):
        return plan(walk(SHAPES[name], (strides(SHAPES[name], layout),)), 4, EMULATED, True).splits

    assert splits("odd", torch.contiguous_format) == splits("odd", torch.channels_last) == 1
    assert splits("several splits", torch.contiguous_format) > 1
    assert splits("several splits, 64 channels", torch.channels_last) > 1
