"""3-D pools and their gradients, on the kernels (on a GPU or emulated) and in reference mode, against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as torch_F

import gpukern.functional as F
from gpukern.ops._pool2d.planner import Tile
from gpukern.ops._pool3d.planner import plan
from gpukern.ops._pool3d.problem import adaptive_pool, volume_pool
from gpukern.runtime.mode import Mode, force_mode
from tests.numerics import assert_within, rounding_bound, sum_bound

pytestmark = pytest.mark.usefixtures("poisoned")

LAYOUTS = (torch.contiguous_format, torch.channels_last_3d)
MAXIMA = {
    "overlapping": lambda f, x, **k: f.max_pool3d(x, 3, 2, 1, **k),
    "oblong, dilated, ceil": lambda f, x, **k: f.max_pool3d(x, (2, 3, 2), (2, 1, 2), (1, 1, 0), (1, 2, 1), True, **k),
    "adaptive": lambda f, x, **k: f.adaptive_max_pool3d(x, (3, 2, 4), **k),
    "adaptive, larger": lambda f, x, **k: f.adaptive_max_pool3d(x, (7, None, 2), **k),
}
AVERAGES = {
    "overlapping": lambda f, x: f.avg_pool3d(x, 3, 2, 1),
    "ceil, padding not counted": lambda f, x: f.avg_pool3d(x, (2, 3, 2), (3, 1, 2), (1, 1, 0), True, False),
    "ceil, padding counted": lambda f, x: f.avg_pool3d(x, 3, 2, 1, True, True),
    "divisor": lambda f, x: f.avg_pool3d(x, 2, divisor_override=3),
    "adaptive": lambda f, x: f.adaptive_avg_pool3d(x, (3, 2, 7)),
    "everything": lambda f, x: f.adaptive_avg_pool3d(x, 1),
}


def both(call, x: torch.Tensor, where) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Results and input gradients: ours, torch's in float64."""
    found = []
    # torch's in NCDHW: for a window of −∞ alone its CPU path of channels_last_3d reports a place in another plane.
    for functions, tensor in ((F, x.to(where)), (torch_F, x.double().contiguous())):
        leaf = tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        results = call(functions, leaf)
        results = results if isinstance(results, tuple) else (results,)
        generator = torch.Generator().manual_seed(0)
        grad = torch.randn(results[0].shape, generator=generator).to(x.dtype).to(leaf)
        (gradient,) = torch.autograd.grad(results[0], leaf, grad)
        found.append([*results, gradient])
    return found[0], found[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", MAXIMA)
def test_maximum_indices_and_gradient(name, layout, dtype, where):
    # Few distinct values, so that there are equal ones; −∞ in a corner; a NaN.
    x = torch.randn(2, 5, 4, 6, 5).mul(2).round().to(dtype).contiguous(memory_format=layout)
    x[0, 0, :3, :4, :3] = -torch.inf
    x[1, 2, 2, 3, 1] = torch.nan
    (y, indices, gradient), (z, expected, truth) = both(lambda f, x: MAXIMA[name](f, x, return_indices=True), x, where)
    assert torch.equal(y.double().cpu().nan_to_num(9.0), z.nan_to_num(9.0)) and torch.equal(indices.cpu(), expected)
    layouts = [each.stride() for each in MAXIMA[name](torch_F, x, return_indices=True)]
    assert [y.stride(), indices.stride()] == layouts
    assert_within(name, gradient, truth, sum_bound(truth, truth.abs() + 8, 8, dtype))
    assert gradient.stride() == x.stride()
    alone = MAXIMA[name](F, x.to(where))
    assert torch.equal(alone.nan_to_num(9.0), y.nan_to_num(9.0))


def test_more_than_256_taps(device):
    (*results, gradient), (*expected, truth) = both(
        lambda f, x: f.max_pool3d(x, (5, 9, 7), 1, (2, 4, 3), return_indices=True), torch.randn(1, 1, 3, 5, 4), device
    )
    assert all(torch.equal(a.double().cpu(), b.double()) for a, b in zip(results, expected, strict=True))
    assert_within("gradient", gradient, truth, sum_bound(truth, truth.abs() + 8, 60, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", AVERAGES)
def test_average_and_gradient(name, layout, dtype, where):
    x = torch.randn(2, 5, 4, 6, 5).to(dtype).contiguous(memory_format=layout)
    (y, gradient), (z, truth) = both(AVERAGES[name], x, where)
    assert_within(name, y, z, sum_bound(z, torch.full_like(z, 4.0), 120, dtype))
    assert_within(name, gradient, truth, sum_bound(truth, torch.full_like(truth, 8.0), 27, dtype))
    assert y.stride() == AVERAGES[name](torch_F, x.float()).stride() and gradient.stride() == x.stride()


@pytest.mark.parametrize("view", ["expanded", "cropped"])
def test_any_strides(view, where):
    base = torch.randn(2, 1, 4, 6, 5).expand(2, 3, 4, 6, 5)
    if view == "cropped":
        base = torch.randn(2, 6, 7, 8, 4).permute(0, 4, 1, 2, 3)[:, 1:, 1:5, :6, 2:7]
    for call in (*MAXIMA.values(), *AVERAGES.values()):
        y, z = call(F, base.to(where)), call(torch_F, base)
        assert_within(view, y, z.double(), rounding_bound(z.double(), torch.float32, 4) + 1e-6)


@pytest.mark.parametrize("name", ["overlapping", "adaptive"])
def test_unbatched_and_empty(name, where):
    x = torch.randn(3, 4, 6, 5, device=where)
    for calls in (MAXIMA, AVERAGES):
        one = calls[name](F, x)
        assert torch.equal(one, calls[name](F, x[None])[0])
        assert calls[name](F, x[None][:0]).shape == (0, *one.shape)
    values, indices = MAXIMA[name](F, x, return_indices=True)
    assert values.shape == indices.shape == MAXIMA[name](F, x).shape
    assert F.adaptive_avg_pool3d(x, (2, 0, 2)).shape == (3, 2, 0, 2)
    nothing = torch.randn(1, 2, 4, 4, 4, device=where, requires_grad=True)
    F.adaptive_max_pool3d(nothing, (2, 0, 2)).sum().backward()
    assert not nothing.grad.any()


def test_derivatives_of_any_order_jvp_and_vmap_are_torchs():
    with force_mode(Mode.REFERENCE):
        x = torch.randn(1, 2, 4, 3, 4, dtype=torch.float64, requires_grad=True)
        calls = MAXIMA["overlapping"], MAXIMA["adaptive"], AVERAGES["overlapping"], AVERAGES["adaptive"]
        for call in calls:

            def ours(x, call=call):
                return call(F, x)

            assert torch.autograd.gradcheck(ours, (x,), fast_mode=True, check_forward_ad=True)
            assert torch.autograd.gradgradcheck(ours, (x,), fast_mode=True)
            several = torch.stack([x.detach(), -x.detach()])
            torch.testing.assert_close(torch.func.vmap(ours)(several), torch.stack([ours(each) for each in several]))


def test_gather_is_the_transpose_of_scatter(device):
    """On the kernels: second derivatives of a maximum read other volumes along its taps."""
    x = torch.randn(2, 3, 4, 4, 5, device=device, requires_grad=True)
    y = F.max_pool3d(x, 3, 2, 1)
    grad = torch.randn_like(y).requires_grad_()
    (first,) = torch.autograd.grad(y, x, grad, create_graph=True)
    other = torch.randn_like(x)
    (second,) = torch.autograd.grad(first, grad, other)
    _, indices = torch_F.max_pool3d(x.detach().cpu(), 3, 2, 1, return_indices=True)
    expected = other.cpu().flatten(2).gather(2, indices.flatten(2)).reshape(indices.shape)
    assert torch.equal(second.cpu(), expected)


def test_plans():
    pool = volume_pool((8, 64, 16, 56, 56), (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1), False)
    chosen = plan(pool, True, 2)
    assert chosen.tile == Tile(64, 16) and chosen.window == (3, 3, 3) and chosen.owners == (2, 2, 2)
    assert chosen.divisor == 27  # padding counts and nothing hangs over
    adaptive = plan(adaptive_pool((8, 64, 10, 9, 8), (3, 4, 16)), False, 4)
    assert adaptive.window == (4, 3, 1) and adaptive.owners == (2, 2, 2)


def test_a_window_without_voxels_has_no_gradient(where):
    x = torch.randn(1, 2, 2, 2, 2, device=where, requires_grad=True)
    y = F.max_pool3d(x, 2, 3, 1, dilation=3)
    y.sum().backward()
    assert y.isneginf().all() and not x.grad.any()
