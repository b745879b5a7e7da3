"""Calls that change tensors in place, and the order in which things then happen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.compiler.nets import Net, conv, conv_norm, sequential
from tests.compiler.training import assert_follows, assert_step_follows, bound, depth, pair

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPE = 3, 4, 6, 5

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "F.relu": F.relu,
    "F.relu, in place": lambda x: F.relu(x, inplace=True),
    "relu": lambda x: x.relu(),
    "relu_": lambda x: x.relu_(),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "F.relu_": F.relu_,
    "clamp": lambda x: x.clamp(0, 6),
    "F.relu6": F.relu6,
    "F.relu6, in place": lambda x: F.relu6(x, inplace=True),
    "F.hardtanh, in place": lambda x: F.hardtanh(x, 0.0, 6.0, inplace=True),
    "F.hardtanh": F.hardtanh,
    "F.leaky_relu": lambda x: F.leaky_relu(x, 0.3),
    "F.leaky_relu, in place": lambda x: F.leaky_relu(x, negative_slope=0.2, inplace=True),
    "F.leaky_relu, falling": lambda x: F.leaky_relu(x, -0.3),
    "F.silu": F.silu,
    "F.silu, in place": lambda x: F.silu(x, inplace=True),
    "F.hardswish": F.hardswish,
    "F.hardswish, in place": lambda x: F.hardswish(x, True),
    "F.hardsigmoid": F.hardsigmoid,
    "F.gelu": F.gelu,
    "F.gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": lambda x: x.sigmoid(),
    "sigmoid_": lambda x: x.sigmoid_(),
    "torch.sigmoid": torch.sigmoid,
    "tanh_": lambda x: x.tanh_(),
    "F.tanh": F.tanh,
    "F.mish, which gpukern does not have": F.mish,
    "F.elu, in place": lambda x: F.elu(x, inplace=True),
}
MODULES = (
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(inplace=True), nn.LeakyReLU(0.2, inplace=True), nn.SiLU(inplace=True),
    nn.Hardswish(inplace=True), nn.Hardsigmoid(inplace=True), nn.GELU("tanh"), nn.Sigmoid(), nn.Tanh(), nn.PReLU(),
)  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, cpu):
    """After a norm before a convolution, after a norm and a residual, after a bias."""
    act = ACTIVATIONS[name]

    def forward(net, x):
        y = act(net.first(x))
        return act(net.after(act(net.norm(net.conv(y)) + x)))

    model, exact, call = pair(lambda: Net(forward, first=nn.BatchNorm2d(4), **layers()), cpu)
    assert_step_follows(call, model, exact, torch.randn(SHAPE), bound(torch.float32, depth(model)))


@pytest.mark.parametrize("act", MODULES, ids=str)
def test_modules(act, cpu):
    model, exact, call = pair(lambda: sequential(conv_norm(4, 6), act, conv(6, 3, bias=True), act), cpu)
    assert_step_follows(call, model, exact, torch.randn(SHAPE), bound(torch.float32, depth(model)))


def layers() -> dict[str, nn.Module]:
    first, norm = conv_norm(4, 4)
    return {"conv": first, "norm": norm, "after": conv(4, 4, bias=True)}


def result_plus_input(net, x):
    y = net.norm(net.conv(x))
    y += x
    y = F.relu(y, inplace=True)
    z = net.after(y)
    z += y
    return z


def read_before(net, x):
    y = net.norm(net.conv(x))
    z = y * 2
    y = F.relu(y, inplace=True)
    return net.after(y) + z


def read_after(net, x):
    y = net.norm(net.conv(x))
    z = F.relu(y, inplace=True)
    return net.after(z) + y


def through_a_view(net, x):
    y = net.norm(net.conv(x))
    F.relu(y[:, :2], inplace=True)
    return net.after(y)


def seen_by_a_view(net, x):
    y = net.norm(net.conv(x))
    view = y.flatten(1)
    y = F.relu(y, inplace=True)
    return net.after(y), view


def gate(net, x):
    y = net.norm(net.conv(x))
    y = y * y.mean((2, 3), keepdim=True)
    y += x
    return net.after(F.relu(y, inplace=True))


@pytest.mark.parametrize("forward", [result_plus_input, read_before, read_after, through_a_view, seen_by_a_view, gate])
def test_results_that_change(forward, cpu):
    model, exact, call = pair(lambda: Net(forward, **layers()), cpu)
    assert_step_follows(call, model, exact, torch.randn(SHAPE), bound(torch.float32, depth(model)))


def test_torchs_error_where_backward_needs_what_changed(cpu):
    def forward(net, x):
        x = torch.sigmoid(x)
        y = net.norm(net.conv(x))
        x += y
        return net.after(x)

    _, exact, call = pair(lambda: Net(forward, **layers()), cpu)
    for net, x in ((call, torch.randn(SHAPE)), (exact, torch.randn(SHAPE).double())):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            net(x).sum().backward()


CHANGES: dict[str, Callable[[torch.Tensor], object]] = {
    "mul_": lambda x: x.mul_(3),
    "relu": lambda x: F.relu(x, inplace=True),
    "torch.relu_": torch.relu_,
    "view": lambda x: x.view(-1).add_(1),
    "item": lambda x: x.__setitem__((slice(None), 1), 1.0),
    "slice": lambda x: x[:1].copy_(x[1:2]),
    "out": lambda x: torch.mul(x, 3, out=x),
    "dropout": lambda x: F.dropout(x, 1.0, inplace=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_input_that_changes_before_it_is_added(change, cpu):
    """The convolution is not computed where the sum is."""

    def forward(net, x):
        y = net.conv(x)
        CHANGES[change](x)
        return F.relu(y + x)

    _, exact, call = pair(lambda: Net(forward, conv=conv(4, 4)), cpu)
    x = torch.randn(SHAPE)
    with torch.no_grad():
        expected = exact(x.double())
        assert_follows({"y": call(x)}, {"y": expected}, bound(torch.float32, 1))


def in_another_order(net, x):
    a, b = net.conv(x), F.conv2d(x, net.after.weight, padding=1)
    b = net.norm(b)
    return net.norm(a) * 2 + b


def added_after_another(net, x):
    a, b = net.norm(x), net.norm(2 * x)
    return torch.tanh(a + x) + b


def nested(net, x):
    return net.norm(torch.tanh(net.norm(net.conv(x)) + x))


def asked_between(net, x):
    y = net.conv(x)
    mean = net.norm.running_mean.clone()
    return net.norm(y) + mean[:, None, None]


@pytest.mark.parametrize("forward", [in_another_order, added_after_another, nested, asked_between])
def test_a_norm_that_is_called_twice_keeps_its_order(forward, cpu):
    model, exact, call = pair(lambda: Net(forward, **layers()), cpu)
    assert_step_follows(call, model, exact, torch.randn(SHAPE), bound(torch.float32, depth(model)))


def weights_from_the_input(net, x):
    weights = F.silu(net.norm(net.conv(x)))
    return torch.tanh(F.conv2d(x, weights, weights.mean((1, 2, 3)), padding=1))


def of_itself(net, x):
    y = F.silu(net.norm(net.conv(x)))
    return F.conv2d(y, y)


def standardized(net, x):
    filters = net.conv.weight
    filters = filters / filters.square().mean((1, 2, 3), keepdim=True).sqrt()
    return F.silu(net.norm(F.conv2d(x, filters)))


@pytest.mark.parametrize("forward", [weights_from_the_input, of_itself, standardized])
def test_weights_that_the_graph_computes(forward, cpu):
    model, exact, call = pair(lambda: Net(forward, **layers()), cpu)
    assert_step_follows(call, model, exact, torch.randn(4, 4, 3, 3), 2 * bound(torch.float32, depth(model)))
