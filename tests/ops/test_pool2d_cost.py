"""What a pooling costs: by hand, against the launches that are made, and never below the floor."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from gpukern.ops._pool2d import launch
from gpukern.ops._pool2d.cost_model import Pooling, cost, work
from gpukern.ops._pool2d.planner import plan
from gpukern.ops._pool2d.problem import AdaptiveProblem, adaptive_problem, pool_problem
from gpukern.runtime.device import DEVICES, EMULATED, H100, Peaks
from gpukern.runtime.roofline import floor


def windows(size, kernel, stride, padding=0, dilation=1, ceil_mode=False):
    kernel, stride, padding, dilation = (
        (v, v) if isinstance(v, int) else v for v in (kernel, stride, padding, dilation)
    )
    return pool_problem(size, kernel, stride, padding, dilation, ceil_mode)


RESNET = windows((32, 64, 112, 112), 3, 2, 1)
GLOBAL = adaptive_problem((32, 2048, 7, 7), (1, 1))
PROBLEMS = (
    RESNET,
    GLOBAL,
    windows((32, 20, 28, 28), 2, 2),
    windows((2, 5, 9, 8), (3, 2), 2, 1, ceil_mode=True),
    windows((2, 40, 30, 31), 3, 4),
    windows((2, 8, 64, 64), 8, 8),
    windows((2, 8, 64, 64), 17, 16),
    windows((0, 8, 16, 16), 2, 2),
    windows((1, 3, 2, 2), 2, 1, 1),
    adaptive_problem((8, 40, 10, 9), (3, 4)),
    adaptive_problem((2, 40, 3, 4), (10, 9)),
    adaptive_problem((2, 40, 3, 4), (0, 9)),
    adaptive_problem((0, 40, 3, 4), (2, 2)),
)


def test_work_of_resnets_maximum():
    x, y = 32 * 64 * 112 * 112, 32 * 64 * 56 * 56
    # The first row and column have a window of two: (3·56 − 1)² elements.
    assert work(RESNET, Pooling.MAX, 2).flops == 32 * 64 * 167**2
    assert work(RESNET, Pooling.MAX, 2).bytes == 2 * (x + y) == 64_225_280
    # For training, a byte for each output, written and read again.
    assert work(RESNET, Pooling.MAX_WITH_TAPS, 2).bytes == 2 * (x + y) + y
    assert work(RESNET, Pooling.MAX_GRAD, 2).bytes == 2 * (x + y) + y
    assert work(RESNET, Pooling.MAX_GRAD, 2).flops == y
    least = floor(work(RESNET, Pooling.MAX, 2), H100.peaks)
    assert (least.bound, least.seconds) == ("memory", pytest.approx(19.172e-6, rel=1e-4))


def test_work_of_a_global_average():
    planes = 32 * 2048
    for pooling in (Pooling.AVG, Pooling.AVG_GRAD):
        must = work(GLOBAL, pooling, 4)
        assert (must.flops, must.bytes, must.kind) == (planes * 49, 4 * planes * 50, "fma")


def test_a_stride_beyond_the_kernel_skips_pixels():
    p = windows((1, 1, 10, 10), 1, 3)  # rows 0, 3, 6, 9
    assert work(p, Pooling.AVG, 4).bytes == 4 * (16 + 16)
    assert work(p, Pooling.AVG_GRAD, 4).bytes == 4 * (16 + 100)  # all of dx is written


def test_adaptive_windows_overlap():
    # 10 rows in 3 windows: 0 … 3, 3 … 6, 6 … 9.
    assert work(adaptive_problem((1, 1, 10, 1), (3, 1)), Pooling.AVG, 4).flops == 12


def test_a_tap_is_as_wide_as_the_kernels_store_it():
    for kernel in ((16, 16), (16, 17)):
        p = windows((1, 1, 40, 40), kernel, 16)
        extra = work(p, Pooling.MAX_WITH_TAPS, 4).bytes - work(p, Pooling.MAX, 4).bytes
        assert extra == p.P * p.Q * launch.taps_dtype(kernel).itemsize


ENDLESS = dataclasses.replace(H100, peaks=Peaks(1e30, H100.peaks.matrix_rates))


def test_cost_of_resnets_maximum():
    # Tiles of 64 channels × 16 pixels of y.
    found = cost(RESNET, Pooling.MAX, plan(RESNET, True, 2), 2, H100)
    assert (found.tiles, found.launches, found.bytes) == (6272, 1, 64_225_280)
    assert found.waves == pytest.approx(6272 / 132)
    assert found.efficiency == pytest.approx(167**2 / (3 * 56) ** 2)
    assert found.seconds == pytest.approx(19.172e-6, rel=1e-4)
    found = cost(RESNET, Pooling.MAX, plan(RESNET, True, 2), 2, ENDLESS)
    assert found.seconds == pytest.approx(48 * 64 * 16 * 9 * 132 / 66.9e12)
    # Backward: 25088 tiles of dx in 191 waves; at most 2 · 2 windows see a pixel.
    found = cost(RESNET, Pooling.MAX_GRAD, plan(RESNET, True, 2), 2, ENDLESS)
    assert found.seconds == pytest.approx(191 * 64 * 16 * 4 * 132 / 66.9e12)


def test_cost_of_a_global_average():
    # A program for each window of 64 channels, eight waves; it takes 16 of the 49 places at a time.
    found = cost(GLOBAL, Pooling.AVG, plan(GLOBAL, True, 2), 2, ENDLESS)
    assert found.tiles == 32 * 32
    assert found.seconds == pytest.approx(8 * 64 * 16 * 4 * 132 / 66.9e12)


def test_a_device_without_peaks():
    with pytest.raises(ValueError, match="emulated"):
        cost(RESNET, Pooling.MAX, plan(RESNET, True, 2), 2, EMULATED)


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "NCHW"])
@pytest.mark.parametrize(
    "p, pooling",
    [
        (p, pooling)
        for p in PROBLEMS
        for pooling in ((Pooling.AVG, Pooling.AVG_GRAD) if isinstance(p, AdaptiveProblem) else Pooling)
    ],
    ids=str,
)
def test_cost_counts_the_launches_that_are_made(p, pooling, channels_last, monkeypatch):
    grids = []
    monkeypatch.setattr(launch, "launch", lambda kernel, grid, *rest: grids.append(grid))
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for dtype in (torch.float16, torch.float32):
        grids.clear()
        x, y = (
            torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=memory_format)
            for shape in ((p.N, p.C, p.H, p.W), (p.N, p.C, p.P, p.Q))
        )
        tensors = [y] if pooling in (Pooling.AVG_GRAD, Pooling.MAX_GRAD) else [x]
        if pooling is Pooling.MAX_GRAD:
            tensors.append(torch.empty_like(y, dtype=launch.taps_dtype(p.kernel)))
        getattr(launch, pooling.value)(p, *tensors, memory_format)
        choice = plan(p, channels_last, dtype.itemsize)
        for device in DEVICES.values():
            found = cost(p, pooling, choice, dtype.itemsize, device)
            assert found.launches == len(grids)
            assert found.tiles == sum(map(math.prod, grids))
            assert floor(work(p, pooling, dtype.itemsize), device.peaks).seconds <= found.seconds
            assert 0 < found.efficiency <= 1
