"""What the proof of a fusion lets pass: every right model, and no fault of a single layer."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gpukern
from gpukern.fusion import FusionError, affine, pipeline
from gpukern.fusion.report import FusionReport
from gpukern.fusion.spread import DRAWS, f_quantile, perturb, spread_of
from gpukern.fusion.verify import FACTOR, Witness
from tests.fusion.networks import conv, lively, net, norm

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("reference_mode"),
]

EPS = torch.finfo(torch.float32).eps


# ---- right models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first, second, expected", [(1, 8, 25.41), (2, 16, 10.97), (10, 80, 3.39), (50, 400, 1.85), (64, 64, 2.20)]
)
def test_the_quantiles_of_f(first, second, expected):
    """From tables: exceeded once in a thousand times."""
    assert f_quantile(first, second) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("directions", [1, 2, 5, 200])
def test_one_more_draw_is_within_what_the_spread_says(directions):
    """Errors in so many directions of an output of 1000 numbers: right models are refused once in a thousand times."""
    generator = torch.Generator().manual_seed(directions)
    basis = torch.linalg.qr(torch.randn(1000, directions, generator=generator, dtype=torch.float64))[0].T
    beyond, factors = 0, []
    for _ in range(trials := 1000):
        errors = torch.randn(DRAWS + 1, directions, generator=generator, dtype=torch.float64) @ basis
        size, factor = spread_of(list(errors[:-1]))
        beyond += errors[-1].norm().item() > factor * size
        factors.append(factor)
    assert beyond <= 5  # 1 expected, and that without the margin for the order of sums
    assert sum(factors) / trials < {1: 8, 2: 7, 5: 4, 200: 1.8}[directions]


def common(seed: int) -> tuple[nn.Module, torch.Tensor]:
    """What is common to a long sum and the model's own is taken away: the error of a few roundings, of any sign, is
    all that a right model's error is, in one direction of the output."""
    torch.manual_seed(seed)
    x = torch.randn(1, 256, 1, 1)
    model, _ = net(
        lambda m, x: (m.b(m.a(x)).mean((1, 2, 3)) - m.c.running_mean[0]) * m.c.running_var[None],
        a=nn.Conv2d(256, 64, 1),
        b=nn.BatchNorm2d(64),
        c=nn.BatchNorm1d(8),
    )
    with torch.no_grad():
        model.c.running_mean[0] = model.b(model.a(x)).mean() * (1 - 1e-4)
    return model, x


def test_what_differs_by_chance_is_not_refused():
    """The error is of one direction: with the factor for models whose errors have many, a third of these would be."""
    chance = 0
    for seed in range(8):
        model, x = common(seed)
        found = gpukern.fuse(model, x, dynamic_batch=False).report.verification
        chance += found.factor > FACTOR
    assert chance, "none of these models needed the spread: the test shows nothing"


def test_the_format_of_images_counts():
    """What the fused model is compared with has its images in the same format: sums are in another order there."""
    model = lively(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval())
    seen = []
    model[0].register_forward_pre_hook(lambda layer, given: seen.append(given[0].stride(1)))
    witness = Witness(model, (torch.randn(2, 8, 9, 9),), torch.float32, channels_last=True)
    assert set(seen) == {81}
    wrong = witness.judge(lambda x: torch.randn(2, 8, 5, 5))
    assert not wrong.passed and wrong.factor > FACTOR
    assert set(seen) == {81, 1} and seen.count(1) == DRAWS


def test_weights_are_perturbed_by_half_a_unit_at_most():
    model = nn.Linear(64, 64)
    before = model.weight.detach().clone()
    perturb(model, torch.Generator().manual_seed(0))
    change = (model.weight.double() - before.double()).abs() / before.double().abs()
    assert 0 < change.max() <= EPS and (change > 0).double().mean() > 0.2


# ---- faults of one layer ---------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.c = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.b, self.d = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(self.d(self.c(F.relu(self.b(self.a(x))))) + x)


#: The second convolution of the third block.
FAULTY = 6


def deep() -> tuple[nn.Module, torch.Tensor]:
    """Seven convolutions of 16 channels, and a head."""
    torch.manual_seed(0)
    blocks = [Block(16) for _ in range(3)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    return lively(nn.Sequential(nn.Conv2d(3, 16, 3), *blocks, *head)), torch.randn(2, 3, 12, 12)


def bias_of_one_channel(weight, bias):
    bias[3] += 2e-4 * bias.abs().mean()


def bias_left_out(weight, bias):
    bias.zero_()


def swapped_channels(weight, bias):
    weight[[2, 5]] = weight[[5, 2]].clone()


def one_tap_of_one_channel(weight, bias):
    weight[4, :, 0, 2] = 0


def half(weight, bias):
    weight.copy_(weight.half())


def scale_of_one_channel(weight, bias):
    weight[4] *= 1 + 5e-4


def scale_of_all(weight, bias):
    weight *= 1 + 2e-5


FAULTS = [
    bias_of_one_channel, bias_left_out, swapped_channels, one_tap_of_one_channel, half, scale_of_one_channel,
    scale_of_all,
]  # fmt: skip


def refused(model: nn.Module, x: torch.Tensor) -> tuple[str, FusionReport]:
    with pytest.raises(FusionError, match="the fused model is wrong") as raised:
        gpukern.fuse(model, x)
    report = raised.value.report
    assert not report.verification.passed and "FAILED" in str(report)
    assert FusionReport.from_json(report.to_json()).verification.wrong == report.verification.wrong
    return str(raised.value), report


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_without_a_fault_it_passes(dtype):
    model, x = deep()
    assert gpukern.fuse(model, x, dtype=dtype).report.verification.passed


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_one_layer_is_found_and_named(fault, monkeypatch):
    right = pipeline.lower

    def wrong(program, matches, **options):
        lowered = right(program, matches, **options)
        held = dict(lowered.module.named_buffers())
        fault(held[f"conv2d_{FAULTY}_weight"], held[f"conv2d_{FAULTY}_bias"])
        return lowered

    monkeypatch.setattr(pipeline, "lower", wrong)
    told, _ = refused(*deep())
    assert f"conv2d + batch_norm + add + relu (conv2d_{FAULTY}," in told and "would do" in told


def test_a_forgotten_eps_is_found(monkeypatch):
    """eps is a few millionths, of variances about one: in the middle between the bounds of a group and of the whole."""
    right = affine._batch_norm

    def wrong(program, node):
        found = right(program, node)
        if found is None or not node.name.endswith(f"_{FAULTY - 1}"):
            return found
        given = affine.arguments(node)
        var = affine.constant(program, given["running_var"]).double()
        factor = ((var + given["eps"]) / var).sqrt()
        mean = affine.constant(program, given["running_mean"]).double()
        return affine.Affine(node, found.name, found.scale * factor, found.shift - mean * found.scale * (factor - 1))

    model, x = deep()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 7e-6
    monkeypatch.setattr(affine, "_batch_norm", wrong)
    told, report = refused(model, x)
    assert f"batch_norm_default_{FAULTY - 1}" in told
    # In the whole it is lost among the roundings.
    assert report.verification.error <= report.verification.bound


def test_an_activation_on_the_wrong_side_of_the_residual_is_found(monkeypatch):
    right = pipeline.lower

    def wrong(program, matches, **options):
        lowered = right(program, matches, **options)
        module = lowered.module
        (node,) = (each for each in module.graph.nodes if each.name == lowered.names[FAULTY])
        residual = node.args[3]
        node.update_arg(3, None)
        with module.graph.inserting_after(node):
            added = module.graph.call_function(torch.ops.aten.add.Tensor, (node, residual))
        node.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
        module.recompile()
        names = tuple(added.name if name == node.name else name for name in lowered.names)
        return type(lowered)(module, names, lowered.folded)

    monkeypatch.setattr(pipeline, "lower", wrong)
    assert f"conv2d + batch_norm + add + relu (conv2d_{FAULTY}," in refused(*deep())[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fault_in_a_narrow_dtype_is_found(dtype, monkeypatch):
    right = pipeline.lower

    def wrong(program, matches, **options):
        lowered = right(program, matches, **options)
        dict(lowered.module.named_buffers())[f"conv2d_{FAULTY - 1}_weight"].mul_(1 + 8 * torch.finfo(dtype).eps)
        return lowered

    model, x = deep()
    monkeypatch.setattr(pipeline, "lower", wrong)
    with pytest.raises(FusionError, match=f"conv2d_{FAULTY - 1},"):
        gpukern.fuse(model, x, dtype=dtype)


# ---- beside layers ---------------------------------------------------------------------------------------------------


def test_an_activation_that_leaves_next_to_nothing_is_no_alarm():
    """All but a few of the values before a ReLU are negative: their roundings are measured against these."""
    model, (x,) = net(lambda m, x: F.relu(m.b(m.a(x))), a=conv(), b=norm())
    with torch.no_grad():
        y = model.b(model.a(x))
        model.b.bias -= y.amax((0, 2, 3)) * (1 - 1e-5)
    assert gpukern.fuse(model, x).report.verification.passed


def test_one_norm_used_twice_alone():
    model, (x,) = net(lambda m, x: m.b(m.b(x).sin()), b=norm())
    assert gpukern.fuse(model, x).report.verification.passed
    assert math.isfinite(gpukern.fuse(model, x).report.max_error)
