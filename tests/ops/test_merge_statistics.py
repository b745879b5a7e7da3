"""Statistics and sums of tiles, merged by the last program to arrive: any number of tiles in any order."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from gpukern.ops._reduction import launch as reduction
from gpukern.ops._reduction.functions import Statistics, Sums, merge_statistics, merge_sums, store_part
from gpukern.ops._reduction.launch import sums_and_deviations, with_workspace
from gpukern.runtime.integers import cdiv
from gpukern.runtime.launcher import launch
from tests.numerics import FP32_EPS, assert_within

pytestmark = pytest.mark.usefixtures("poisoned")

#: Pixels of a tile.
SIZE = 8


@triton.jit
def statistics_kernel(
    x_ptr, order_ptr, statistics, rows, pixels, channels, BLOCK: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr
):
    """Statistics of x [pixels, channels]; programs start in their order, and take tiles in another one."""
    columns = tl.cdiv(channels, BLOCK)
    program = tl.load(order_ptr + tl.program_id(0))
    row, column = program // columns, program % columns
    c = (column * BLOCK + tl.arange(0, BLOCK))[None, :]
    for part in tl.static_range(PARTS):
        tile = row * PARTS + part
        pixel = (tile * SIZE + tl.arange(0, SIZE))[:, None]
        ok = (pixel < pixels) & (c < channels)
        x = tl.load(x_ptr + pixel * channels + c, mask=ok, other=0.0)
        count = tl.sum(ok.to(tl.float32), 0, keep_dims=True)
        total = tl.sum(x, 0, keep_dims=True)
        apart = tl.where(ok, x - total / tl.maximum(count, 1.0), 0.0)
        squares = tl.sum(apart * apart, 0, keep_dims=True)
        store_part(statistics.parts, (total, squares, count), tile, rows * PARTS, c, c < channels, channels)
    merge_statistics(statistics, row, rows, column, column * BLOCK, channels, channels, BLOCK, PARTS)


def run(x: torch.Tensor, statistics: Statistics, order: torch.Tensor, block: int, parts: int) -> Statistics:
    pixels, channels = x.shape
    rows, columns = cdiv(pixels, SIZE * parts), cdiv(channels, block)
    given = with_workspace(statistics, channels, x.device, rows, columns, parts, taken=3)
    arguments = (x, order, given, rows, pixels, channels)
    options = {"BLOCK": block, "PARTS": parts, "SIZE": SIZE, "num_warps": 4}
    launch(statistics_kernel, (rows * columns,), x.device, arguments, options)
    assert not given.counters.any()
    return given


def exact(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum and squared deviations in float64, and bounds of both as in ``tests/numerics.py``."""
    values = x.double().cpu()
    eps = 6 * FP32_EPS * len(values) ** 0.5
    squares = (values - values.mean(0)).square().sum(0)
    # The mean errs by eps of the values, which enters the deviations squared, for each pixel.
    off = len(values) * (eps * values.abs().mean(0)).square()
    return (
        values.sum(0),
        squares,
        eps * values.abs().sum(0),
        eps * squares + off + 2 * (off * squares).sqrt() + 1e-30,
    )


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    "pixels, channels, block, group",
    [(5, 3, 4, 32), (100, 70, 64, 32), (256, 64, 32, 16), (257, 6, 4, 32), (300, 40, 16, 4), (800, 3, 4, 64)],
    ids=["1 tile", "1 group", "full groups", "a group of one", "many groups", "groups in pieces"],
)
def test_any_number_of_tiles(pixels, channels, block, group, parts, device, monkeypatch):
    """Channels with a large mean, and one that is constant."""
    monkeypatch.setattr(reduction, "_GROUP", group)
    x = torch.randn(pixels, channels, device=device) + 100 * torch.arange(channels, device=device)
    x[:, -1] = 1e25
    programs = cdiv(pixels, SIZE * parts) * cdiv(channels, block)
    total, deviations, of_total, of_deviations = exact(x[:, :-1])
    bits = []
    for order in (torch.arange(programs), torch.arange(programs).flip(0), torch.randperm(programs)):
        statistics = run(x, sums_and_deviations(channels, device), order.int().to(device), block, parts)
        assert_within("sum", statistics.sums[:-1], total, of_total)
        assert_within("deviations", statistics.deviations[:-1], deviations, of_deviations)
        # A sum of equal values errs by roundings; they would be infinite squared.
        assert statistics.deviations[-1] <= pixels * (6 * FP32_EPS * pixels**0.5 * 1e25) ** 2
        bits.append((statistics.sums, statistics.deviations))
    for others in bits[1:]:
        assert all(torch.equal(a, b) for a, b in zip(bits[0], others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_running_statistics(dtype, device):
    pixels, channels, momentum = 700, 20, 0.3
    x = torch.randn(pixels, channels, device=device) * 3 + 5
    old = torch.randn(2, channels, device=device).to(dtype)
    mean, variance = torch.empty(2, channels, device=device)
    running_mean, running_variance = old.clone()
    order = torch.randperm(cdiv(pixels, SIZE) * 2).int().to(device)
    run(x, Statistics(None, None, None, mean, variance, running_mean, running_variance, momentum), order, 16, 1)
    total, deviations, of_total, of_deviations = exact(x)
    assert_within("mean", mean, total / pixels, of_total / pixels + FP32_EPS * (total / pixels).abs())
    assert_within("variance", variance, deviations / pixels, 2 * of_deviations / pixels)
    before, rounding = old.double().cpu(), 2 * torch.finfo(dtype).eps
    for name, new, previous, batch, error in (
        ("running mean", running_mean, before[0], total / pixels, of_total / pixels),
        ("running variance", running_variance, before[1], deviations / (pixels - 1), 2 * of_deviations / pixels),
    ):
        expected = (1 - momentum) * previous + momentum * batch
        assert_within(name, new, expected, error + rounding * (previous.abs() + batch.abs()))


def test_what_is_not_finite_stays_in_its_channel(device):
    x = torch.randn(700, 6, device=device)
    x[3, 1], x[650, 2] = float("nan"), float("inf")
    order = torch.arange(cdiv(700, SIZE) * 2).int().to(device)
    statistics = run(x, sums_and_deviations(6, device), order, 4, 1)
    assert statistics.sums.isnan().tolist() == [False, True, False, False, False, False]
    assert statistics.sums.isinf().tolist() == [False, False, True, False, False, False]
    assert statistics.deviations.isnan().tolist() == [False, True, True, False, False, False]


@triton.jit
def sums_kernel(x_ptr, order_ptr, sums, rows, pixels, channels, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """Sums of x, 2 · x and 3 · x [pixels, channels]."""
    columns = tl.cdiv(channels, BLOCK)
    program = tl.load(order_ptr + tl.program_id(0))
    row, column = program // columns, program % columns
    c = (column * BLOCK + tl.arange(0, BLOCK))[None, :]
    pixel = (row * SIZE + tl.arange(0, SIZE))[:, None]
    x = tl.load(x_ptr + pixel * channels + c, mask=(pixel < pixels) & (c < channels), other=0.0)
    total = tl.sum(x, 0, keep_dims=True)
    store_part(sums.parts, (total, 2 * total, 3 * total), row, rows, c, c < channels, channels)
    merge_sums(sums, row, rows, column, column * BLOCK, channels, channels, 3, BLOCK)


@pytest.mark.parametrize("rows, group", [(1, 32), (20, 32), (90, 4), (90, 64)])
def test_sums(rows, group, device, monkeypatch):
    monkeypatch.setattr(reduction, "_GROUP", group)
    channels, block = 11, 8
    x = torch.randn(rows * SIZE - 3, channels, device=device)
    programs, bits = rows * cdiv(channels, block), []
    for order in (torch.arange(programs).flip(0), torch.randperm(programs)):
        totals = torch.empty(3, channels, device=device)
        grad_weight, grad_bias = torch.empty(2, channels, device=device, dtype=torch.float16)
        sums = Sums(totals=totals, grad_bias=grad_bias, grad_weight=grad_weight)
        sums = with_workspace(sums, channels, device, rows, cdiv(channels, block), sums=3)
        arguments = (x, order.int().to(device), sums, rows, len(x), channels)
        launch(sums_kernel, (programs,), device, arguments, {"BLOCK": block, "SIZE": SIZE, "num_warps": 4})
        expected, _, bound, _ = exact(x)
        for i in range(3):
            assert_within(f"sum {i}", totals[i], (i + 1) * expected, (i + 1) * bound)
        assert torch.equal(grad_bias, totals[0].half()) and torch.equal(grad_weight, totals[1].half())
        assert not sums.counters.any()
        bits.append(totals)
    assert torch.equal(*bits)
