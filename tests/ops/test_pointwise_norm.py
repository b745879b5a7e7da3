"""A 1×1 convolution between two batch norms, whose input and output are not stored, against float64 on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from gpukern.ops import pointwise_norm as operation
from gpukern.ops._batch_norm.problem import Norm, Running
from gpukern.ops._pointwise_norm.planner import pays, plan, why_not
from gpukern.ops._pointwise_norm.problem import Added, Gradients, Inner, Moments, Outer
from gpukern.ops.pointwise_norm import convolve_between_norms, convolve_between_norms_backward, takes
from gpukern.runtime.device import A100, H200
from gpukern.runtime.mode import Mode, force_mode
from tests.numerics import FP32_EPS

pytestmark = pytest.mark.usefixtures("poisoned")

ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "tanh": torch.tanh}


class Case:
    """Operands, and everything that torch makes of them in float64."""

    def __init__(
        self, shape, outputs, dtype, where, *, act="relu", outer="relu", added="residual", affine=True, mean=1.0
    ) -> None:
        channels = shape[1]

        def image(channels: int, mean: float = 0.0) -> torch.Tensor:
            t = torch.randn(shape[0], channels, *shape[2:]) * 2 + mean
            return t.to(where, dtype).contiguous(memory_format=torch.channels_last)

        def numbers(size: int, low: float) -> torch.Tensor | None:
            return (torch.rand(size) + low).to(where) if affine else None

        self.z, self.grad = image(channels, mean), image(outputs)
        norm = Norm(*statistics(self.z), numbers(channels, 0.5), numbers(channels, -0.5), 1e-5)
        self.inner = Inner(self.z, norm, act, 0.1)
        self.weight = (torch.randn(outputs, channels, 1, 1) / math.sqrt(channels)).to(where, dtype)
        self.outer = Outer(numbers(outputs, 0.5), numbers(outputs, -0.5), 1e-3, outer, 0.1)
        self.added = None
        if added is not None:
            other = image(outputs)
            of_other = Norm(*statistics(other), numbers(outputs, 0.5), numbers(outputs, -0.5), 1e-5)
            self.added = Added(other, of_other if added == "norm" else None)
        self.running = Running(torch.zeros(outputs, device=where), torch.ones(outputs, device=where), 0.1)

    def run(self, needs=(True,) * 4) -> tuple[torch.Tensor, Moments, Gradients]:
        y, moments = convolve_between_norms(self.inner, self.weight, self.outer, self.added, self.running)
        needs = needs[0], needs[1] and self.outer.weight is not None, needs[2] and self.outer.bias is not None, needs[3]
        return (
            y,
            moments,
            convolve_between_norms_backward(self.grad, self.inner, self.weight, self.outer, moments, needs),
        )

    def exact(self) -> dict[str, torch.Tensor | None]:
        (z, norm, act, _), outer = self.inner, self.outer
        z, weight, scale, shift, gamma, beta = (
            None if t is None else t.detach().cpu().double().requires_grad_()
            for t in (z, self.weight, norm.weight, norm.bias, outer.weight, outer.bias)
        )
        normal = F.batch_norm(z, None, None, None, None, True, 0.0, norm.eps).detach()
        u = F.batch_norm(z, None, None, scale, shift, True, 0.0, norm.eps)
        u.retain_grad()
        v = F.conv2d(ACTIVATIONS[act](u), weight)
        mean, variance = torch.zeros(v.shape[1]).double(), torch.ones(v.shape[1]).double()
        inner = F.batch_norm(v, mean, variance, gamma, beta, True, 0.1, outer.eps)
        total = inner
        if self.added is not None:
            other, of_other = self.added
            other = other.cpu().double()
            if of_other is not None:
                scale, shift = (None if t is None else t.cpu().double() for t in (of_other.weight, of_other.bias))
                other = F.batch_norm(other, None, None, scale, shift, True, 0.0, of_other.eps)
            total = inner + other
        inner.backward(self.grad.cpu().double())
        by_u = u.grad
        found = {
            "y": ACTIVATIONS[outer.activation](total), "running mean": mean, "running variance": variance,
            "weight": weight.grad, "inner": by_u,
            "sums": torch.stack([by_u.sum((0, 2, 3)), (by_u * normal).sum((0, 2, 3))]),
        }  # fmt: skip
        parameters = {"norm weight": gamma, "norm bias": beta}
        return found | {name: each.grad for name, each in parameters.items() if each is not None}

    def check(self) -> None:
        """All results, within :func:`bound` of the roundings that are on the way to each."""
        y, _, found = self.run()
        exact = self.exact()
        pixels, terms = self.z.numel() // self.z.shape[1], self.z.shape[1] + self.weight.shape[0]
        results = {
            "y": (y, 2), "running mean": (self.running.mean, 1), "running variance": (self.running.variance, 1),
            "weight": (found.weight, 2), "norm weight": (found.norm_weight, 1), "norm bias": (found.norm_bias, 0),
            "inner": (found.inner, 3), "sums": (found.sums, 4),
        }  # fmt: skip
        assert y.dtype is found.inner.dtype is found.weight.dtype is self.z.dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        for name, wanted in exact.items():
            actual, roundings = results[name]
            error = float((actual.cpu().double() - wanted.detach()).norm() / wanted.detach().norm())
            allowed = bound(self.z.dtype, roundings, pixels, terms)
            assert error <= allowed, f"{name}: relative error {error:.3g} of {allowed:.3g}"


def bound(dtype: torch.dtype, roundings: int, pixels: int, terms: int) -> float:
    """The relative error in the Frobenius norm, as in ``tests/compiler/training.py``, but of one layer.

    A rounding errs by eps / √12 as a standard deviation, of numbers that are all of the same size; sums in fp32 by a
    random walk. Twice that: a norm, or its backward, takes two means away, and what is left is smaller than what erred.
    """
    sums = 6 * FP32_EPS * (math.sqrt(pixels) + math.sqrt(terms))
    return 2 * (torch.finfo(dtype).eps * math.sqrt(roundings / 12) + sums)


def statistics(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    variance, mean = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    return mean.float(), variance.float()


@pytest.mark.parametrize(
    ("shape", "outputs", "dtype", "options"),
    [
        ((3, 16, 5, 3), 16, torch.float16, {}),
        ((2, 48, 7, 5), 80, torch.bfloat16, {"act": "silu", "outer": "tanh", "added": "norm"}),
        ((2, 144, 5, 3), 176, torch.float16, {"added": "norm", "outer": "relu6", "act": "relu6"}),
        ((5, 16, 11, 13), 32, torch.float16, {"affine": False, "added": None, "outer": "none"}),
        ((2, 32, 3, 3), 48, torch.bfloat16, {"act": "none", "added": None}),
    ],
    ids=[
        "one tile",
        "ragged tiles",
        "two blocks of channels",
        "several splits, no parameters",
        "fewer pixels than channels",
    ],
)
def test_results(shape, outputs, dtype, options, where):
    Case(shape, outputs, dtype, where, **options).check()


def test_means_far_above_the_deviations(where):
    """Of z, and of what the convolution reads: bias / weight is 10⁴."""
    case = Case((3, 16, 5, 7), 32, torch.float16, where, act="none", mean=200.0)
    case.inner = case.inner._replace(norm=case.inner.norm._replace(bias=torch.full((16,), 1e4, device=where)))
    y, moments, found = case.run()
    exact = case.exact()
    eps = bound(torch.float16, 3, 105, 48)
    for name, actual in (("y", y), ("weight", found.weight), ("inner", found.inner)):
        assert float((actual.cpu().double() - exact[name].detach()).norm()) <= eps * float(
            exact[name].detach().norm()
        ), name
    variance = (exact["running variance"] - 0.9) / 0.1 * 104 / 105
    assert float((moments.variance.cpu().double() - variance).norm()) <= eps * float(variance.norm())


def test_channels_that_do_not_vary_have_no_variance(where):
    """Neither where the inner norm makes them constant, which is a sum of large numbers, nor where no weight is."""
    case = Case((3, 16, 5, 7), 32, torch.float16, where)
    constant = case.inner.norm._replace(
        weight=torch.zeros(16, device=where), bias=torch.linspace(0.1, 300, 16, device=where)
    )
    case.inner = case.inner._replace(norm=constant)
    y, moments, found = case.run()
    assert not moments.variance.any()
    expected = torch.relu(case.outer.bias.view(1, -1, 1, 1) + case.added.tensor)
    assert torch.equal(y, expected.to(y.dtype))
    assert all(torch.isfinite(each).all() for each in (found.weight, found.inner, found.sums))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value, where):
    case = Case((3, 16, 5, 7), 32, torch.float16, where, act="silu", added=None, outer="none")
    case.z[1, 3, 2, 2] = value
    case.inner = case.inner._replace(norm=case.inner.norm._replace(mean=statistics(case.z)[0]))
    y, moments, found = case.run()
    assert y.isnan().all()
    assert moments.variance.isnan().all()
    assert found.inner.isnan().all()


def test_only_what_is_needed(where):
    case = Case((3, 16, 5, 3), 32, torch.float16, where)
    _, moments, every = case.run()
    for i, needs in enumerate(torch.eye(4, dtype=torch.bool).tolist()):
        found = convolve_between_norms_backward(case.grad, case.inner, case.weight, case.outer, moments, tuple(needs))
        made = [each is not None for each in (*found[:3], found.inner)]
        assert made == needs
        assert torch.equal((*found[:3], found.inner)[i], (*every[:3], every.inner)[i])


def test_gradients_and_weights_in_other_layouts(where):
    case = Case((3, 16, 5, 7), 32, torch.float16, where)
    expected = case.run()[2]
    case.grad = case.grad.contiguous()
    case.weight = case.weight[:, :, 0, 0].t().contiguous().t()[:, :, None, None]
    found = case.run()[2]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    case.grad = torch.ones((), dtype=torch.float16, device=where).expand(case.grad.shape)
    assert torch.isfinite(case.run()[2].weight).all()


def test_the_algebra_is_that_of_float64():
    """The reference fed float64 beside autograd: everything but rounding."""
    case = Case((3, 16, 5, 7), 32, torch.float64, torch.device("cpu"), act="silu", added="norm")
    case.running = Running(torch.zeros(32).double(), torch.ones(32).double(), 0.1)
    norm = case.inner.norm
    variance, mean = torch.var_mean(case.z, (0, 2, 3), correction=0)
    case.inner = case.inner._replace(norm=norm._replace(mean=mean, variance=variance))
    other = case.added.tensor
    variance, mean = torch.var_mean(other, (0, 2, 3), correction=0)
    case.added = Added(other, case.added.norm._replace(mean=mean, variance=variance))
    with force_mode(Mode.REFERENCE):
        y, _, found = case.run()
    exact = case.exact()
    for name, actual in (("y", y), ("weight", found.weight), ("inner", found.inner), ("sums", found.sums)):
        torch.testing.assert_close(actual, exact[name], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(case.running.variance, exact["running variance"], rtol=1e-9, atol=1e-9)


# ---- where it is taken ----------------------------------------------------------------------------------------------


def test_what_it_takes(monkeypatch):
    monkeypatch.setattr(operation, "pays", lambda *_: True)
    z = torch.zeros(2, 16, 3, 3, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    w = torch.zeros(32, 16, 1, 1, dtype=torch.float16)
    other = torch.zeros(2, 32, 3, 3, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    assert takes(z, w, other)
    assert takes(z, w, None)
    assert not takes(z.contiguous(), w, None)
    assert not takes(z, w, other.contiguous())
    assert not takes(z, w, other.bfloat16())
    assert not takes(z.float(), w.float(), None)
    assert not takes(z[:1, :, :1, :1], w, None)
    assert not takes(z[:0], w, None)
    assert not takes(z, w.bfloat16(), None)
    assert why_not(24, 32) == "channels are no multiples of 16"
    assert why_not(32, 32) == "has no more outputs than channels"
    assert why_not(272, 512) == "more than 256 channels"


@pytest.mark.parametrize("device", [H200, A100], ids=lambda device: device.name)
def test_it_pays_in_all_stages_of_resnet50_but_the_last(device):
    stages = {(32 * 56 * 56, 64, 256): True, (32 * 28 * 28, 128, 512): True, (32 * 7 * 7, 512, 2048): False}
    assert {sizes: pays(*sizes, "float16", device) for sizes in stages} == stages
    assert pays(32 * 14 * 14, 256, 1024, "float16", H200)
    assert not pays(512, 64, 256, "float16", device)


def test_every_program_of_a_sum_has_pixels():
    for pixels, channels, outputs in ((2, 16, 16), (32 * 56 * 56, 64, 256), (32 * 14 * 14, 256, 1024)):
        chosen = plan(pixels, channels, outputs, H200)
        for tile in (chosen.gram, chosen.products):
            assert tile.splits >= 2
            assert tile.splits == 2 or pixels // tile.splits >= tile.pixels
