"""Layers and functions of each kind, on every patch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import gpukern
from gpukern import functional as GF
from gpukern.densify import dense
from gpukern.densify.steps import Average, Convolve, Crop, Maximum
from tests.densify.patches import assert_equals_patches
from tests.densify.test_dense_refusals import C, Calling

pytestmark = pytest.mark.usefixtures("reference_mode")


class Gain(nn.Module):
    """A buffer, a parameter and a plain tensor of the model's own, and a default argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 7)
        self.register_buffer("mean", torch.randn(1, 2, 1, 1))
        self.gain = nn.Parameter(torch.randn(3))
        self.offset = torch.tensor(0.3)

    def forward(self, x, mask=None):
        assert x.shape[1:] == (2, 7, 7)
        x = (x - self.mean) * 0.5 + self.offset
        return self.conv(x).flatten(1) * self.gain if mask is None else x


class Shared(nn.Module):
    """One pool and one convolution, called at two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.out = nn.Conv2d(2, 2, 3), nn.MaxPool2d(2), nn.Linear(2 * 4, 2)

    def forward(self, x):
        for _ in range(2):
            x = self.pool(self.conv(x))
        return self.out(x.view(x.shape[0], -1))


class Derived(nn.Conv2d):
    """A subclass that changes nothing."""


class Standing(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)


def dense_block(layers, x):
    for layer in layers[:2]:
        x = torch.cat([x[:, :, 1:-1, 1:-1], layer(x)], 1)
    return layers[2](x)


def with_outputs(layers, x):
    """Of one axis at a time: [N, C, w] between."""
    return layers[1](layers[0](x).mean(2).mean(-1))


def overwritten(layers, x):
    y = layers[0](x)
    same = y
    y.relu_()
    y += 1
    F.elu(y.sub_(1.5), inplace=True)
    return same * 2


def overwritten_by_a_layer(layers, x):
    y = layers[0](x)
    z = layers[1](y)
    return layers[2](z + y)


CASES = {
    "average pool": (nn.Sequential(C(2, 3, 2), nn.AvgPool2d(3, 2), nn.ReLU(), C(3, 2, 2)), (7, 7)),
    "average pool with a divisor": (nn.Sequential(nn.AvgPool2d(2, 1, divisor_override=3), C(2, 2, 6)), (7, 7)),
    "a large average": (nn.Sequential(C(2, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)), (10, 12)),
    "a sum over positions": (Calling(lambda f, x: f[0](x.sum((2, 3))), nn.Linear(2, 3)), (9, 8)),
    "ceil_mode that changes nothing": (nn.Sequential(nn.MaxPool2d(2, 2, ceil_mode=True), C(2, 2, 3)), (6, 6)),
    "adaptive pool of equal windows": (nn.Sequential(nn.AdaptiveAvgPool2d((2, None)), C(2, 2, (2, 7))), (6, 7)),
    "adaptive maximum": (nn.Sequential(nn.AdaptiveMaxPool2d(3), nn.Flatten(), nn.Linear(18, 2)), (6, 9)),
    "overlapping adaptive windows": (nn.Sequential(nn.AdaptiveAvgPool2d(2), C(2, 2, 2)), (7, 7)),
    "one axis at a time": (Calling(with_outputs, C(2, 3, 3), nn.Linear(3, 2)), (6, 7)),
    "positions in one dimension": (Calling(lambda f, x: f[0](x.flatten(2).mean(-1)), nn.Linear(2, 2)), (4, 5)),
    "squeezed": (Calling(lambda f, x: f[0](x).squeeze(-1).squeeze(-1), C(2, 3, (4, 5))), (4, 5)),
    "the central pixel": (Calling(lambda f, x: f[0](x[:, :, 2, -2]), nn.Linear(2, 3)), (5, 4)),
    "every second pixel": (Calling(lambda f, x: f[0](x[:, :, ::2, 1::3]), C(2, 2, (3, 2))), (6, 7)),
    "negative padding": (nn.Sequential(nn.ZeroPad2d((-1, 0, -2, -1)), C(2, 2, 3)), (6, 4)),
    "groups and halves": (
        Calling(lambda f, x: f[1](math.prod(f[0](x).chunk(2, 1))), C(2, 6, 3, groups=2), C(3, 2, 3)),
        (5, 5),
    ),
    "glu": (nn.Sequential(C(2, 4, 3), nn.GLU(1), C(2, 2, 3)), (5, 5)),
    "dense connections": (Calling(dense_block, C(2, 2, 3), C(4, 2, 3), C(6, 3, 3)), (7, 7)),
    "a batch norm of rows": (nn.Sequential(nn.Flatten(), nn.Linear(18, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), (3, 3)),
    "a layer norm of rows": (nn.Sequential(nn.Flatten(), nn.Linear(18, 4), nn.LayerNorm(4), nn.Linear(4, 2)), (3, 3)),
    "a norm over channels": (nn.Sequential(C(2, 4, 2), gpukern.nn.LayerNorm2d(4), C(4, 2, 2)), (3, 3)),
    "local response norm": (nn.Sequential(C(2, 4, 2), nn.LocalResponseNorm(3), C(4, 2, 2)), (3, 3)),
    "logarithms of shares": (nn.Sequential(nn.Flatten(), nn.Linear(18, 4), nn.LogSoftmax(-1)), (3, 3)),
    "softmax over maps": (nn.Sequential(C(2, 4, 3), nn.Softmax2d()), (3, 3)),
    "gpukern's functions": (
        Calling(lambda f, x: GF.relu(GF.conv2d(x, f[0].weight, f[0].bias, 2, activation="tanh")), C(2, 3, 3)),
        (4, 4),
    ),
    "weight norm": (nn.Sequential(parametrizations.weight_norm(C(2, 3, 3)), nn.Flatten(), nn.Linear(27, 2)), (5, 5)),
    "a subclass": (nn.Sequential(Derived(2, 3, 3, stride=2), Standing(3, 2, 2)), (5, 5)),
    "tensors of the model's own": (Gain(), (7, 7)),
    "layers called twice": (Shared(), (16, 16)),
    "not flattened": (nn.Sequential(nn.Flatten(), nn.Unflatten(1, (2, 4, 3)), C(2, 2, (4, 3))), (4, 3)),
    "a gate of one channel": (Calling(lambda f, x: f[1](x * torch.sigmoid(f[0](x))), C(2, 1, 1), C(2, 2, 3)), (3, 3)),
    "rows that end early": (nn.Sequential(C(2, 3, 2, stride=3), nn.MaxPool2d(2, 2), C(3, 2, (2, 3))), (16, 17)),
    "branches that end at other rows": (
        Calling(lambda f, x: f[0](F.max_pool2d(x[:, :, :7, :7], 2) + F.avg_pool2d(x[:, :, 1:7, 2:], 2)), C(2, 2, 3)),
        (8, 8),
    ),
    "results that nobody takes": (Calling(overwritten, C(2, 2, 3)), (3, 3)),
    "results that a layer overwrites": (
        Calling(overwritten_by_a_layer, C(2, 3, 3), nn.ReLU(inplace=True), C(3, 2, 3)),
        (5, 5),
    ),
    "conversions": (Calling(lambda f, x: f[0](x).double(), C(2, 3, 3)), (3, 3)),
    "a column of nothing": (Calling(lambda f, x: f[0](x).flatten(1)[:, :, None, None], C(2, 3, 3)), (3, 3)),
    "a classifier of pixels": (nn.Sequential(C(2, 4, 1), nn.ReLU(), C(4, 2, 1)), (1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layers_and_functions_give_what_they_give_for_every_patch(case):
    model, patch = CASES[case]
    model = model.eval().double()
    image = torch.randn(2, 2, patch[0] + 3, patch[1] + 2, dtype=torch.float64)
    assert_equals_patches(dense(model, patch), model, image, torch.float64)


def operations(network) -> list:
    return [step.operation for step in network._steps]


@pytest.mark.parametrize("part", [slice(3), slice(-3, None), slice(None, None, 2)])
def test_an_image_may_have_channels_that_no_layer_takes(part):
    model = Calling(lambda f, x: f[0](x[:, part]), C(3, 2, 3)).double()
    image = torch.randn(1, 5, 5, 6, dtype=torch.float64)
    assert_equals_patches(dense(model, 3), model, image, torch.float64)


def test_strides_become_dilations_of_what_follows():
    pool, last = nn.MaxPool2d((2, 1), (2, 3)), C(2, 2, (2, 4), dilation=(4, 1))
    network = dense(nn.Sequential(C(1, 2, 3, stride=2), pool, last), 23)
    conv, pool, last, crop = operations(network)
    assert (conv.dilation, pool.dilation, last.dilation) == ((1, 1), (2, 2), (16, 6))
    assert isinstance(conv, Convolve)
    assert isinstance(pool, Maximum)
    # The pool leaves out one of 11 rows and one of 11 columns, which are 2 pixels apart.
    assert crop == Crop((0, 2), (0, 2))


def test_activations_are_in_the_epilogues_of_convolutions_that_nobody_else_reads():
    def residual(layers, x):
        y = layers[0](x)
        return layers[1](torch.relu(y) + y)

    plain = dense(nn.Sequential(C(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2)), 5)
    assert [type(each) for each in operations(plain)] == [Convolve, Convolve]
    assert operations(plain)[0].activation is not None
    twice = dense(Calling(residual, C(1, 2, 3), C(2, 2, 3)), 5)
    assert [type(each).__name__ for each in operations(twice)] == ["Convolve", "Call", "Call", "Convolve"]


def test_large_averages_are_summed_by_rows_first():
    network = dense(nn.Sequential(nn.AvgPool2d(8), C(1, 2, 1)), 8)
    average = operations(network)[0]
    assert isinstance(average, Average)
    image = torch.randn(1, 1, 9, 10, dtype=torch.float64)
    seen = []
    kernels = type("Seen", (), {"conv2d": lambda self, n, x, h, weight, *_: seen.append(weight.shape) or x})()
    average.run(network, kernels, image)
    assert seen == [(1, 1, 8, 1), (1, 1, 1, 8)]


def test_functional_dropout_follows_the_mode_of_the_network_and_a_constant_one_does_not():
    follows = dense(Calling(lambda f, x: F.dropout(x, 0.5, f.training), nn.Identity()), 1)
    always = dense(Calling(lambda f, x: F.dropout(x, 0.5)), 1)
    never = dense(Calling(lambda f, x: F.dropout(x, 0.5, False)), 1)
    ones = torch.ones(1, 1, 30, 30)
    assert torch.equal(never.train()(ones), ones)
    assert (follows.train()(ones) == 0).any()
    assert torch.equal(follows.eval()(ones), ones)
    assert (always.eval()(ones) == 0).any()


def test_the_dtype_of_a_softmax_is_kept_wherever_it_stands():
    network = dense(Calling(lambda f, x: torch.softmax(f[0](x), 1, torch.float64), C(1, 2, 3)), 3)
    assert network(torch.randn(1, 1, 5, 5)).dtype is torch.float64


def test_layers_that_work_in_place_leave_the_image_alone():
    model = nn.Sequential(nn.ReLU(inplace=True), C(1, 2, 3), nn.ELU(inplace=True))
    image = torch.randn(1, 1, 5, 5)
    before = image.clone()
    dense(model, 3)(image)
    assert torch.equal(image, before)
    assert model[0].inplace
