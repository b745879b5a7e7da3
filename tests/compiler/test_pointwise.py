"""1×1 convolutions between two batch norms, whose input and output are not stored: where, and what they give."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gpukern.ops.pointwise_norm as operation
from gpukern.compiler import pointwise
from gpukern.compiler.steps import LARGE
from tests.compiler.nets import Net, conv, conv_norm, frozen, sequential
from tests.compiler.training import (
    assert_follows,
    assert_step_follows,
    bound,
    calls_of,
    depth,
    loss,
    losses,
    pair,
    state,
)

pytestmark = pytest.mark.usefixtures("poisoned")

IMAGES = 4, 16, 5, 3


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Small networks too."""
    monkeypatch.setattr(operation, "pays", lambda *_: True)


def bottleneck(inputs: int = 32, *, first: bool = False, inner=F.silu, outer=torch.tanh, **last) -> Net:
    """A ResNet's block of 16 and 32 channels; ``first``: the shortcut is computed before the main branch."""

    def forward(net, x):
        shortcut = net.shortcut(x) if first else None
        y = inner(net.bn1(net.conv1(x)))
        y = inner(net.bn2(net.conv2(y)))
        y = net.bn3(net.conv3(y))
        return outer(y + (net.shortcut(x) if shortcut is None else shortcut))

    (conv1, bn1), (conv2, bn2) = conv_norm(inputs, 16, 1), conv_norm(16, 16)
    conv3, bn3 = conv_norm(16, 32, 1, **last)
    shortcut = nn.Identity() if inputs == 32 else nn.Sequential(*conv_norm(inputs, 32, 1))
    return Net(forward, conv1=conv1, bn1=bn1, conv2=conv2, bn2=bn2, conv3=conv3, bn3=bn3, shortcut=shortcut)


def narrow(*layers) -> nn.Sequential:
    """Blocks, and what reads the last of them."""
    return sequential(*layers, conv(32, 16, 1))


def ready(make, where, dtype=torch.float16, **options):
    model, exact, call = pair(make, where, **options)
    model.to(dtype).to(memory_format=torch.channels_last)
    exact.load_state_dict(model.state_dict())
    return model, exact, call


def images(where, dtype=torch.float16, shape=IMAGES):
    return torch.randn(shape).to(where, dtype).contiguous(memory_format=torch.channels_last)


@contextlib.contextmanager
def taking(count: int, monkeypatch):
    """As many convolutions as ``count`` run between their norms inside."""
    with calls_of("convolve_between_norms", monkeypatch, pointwise) as calls:
        yield
    assert len(calls) == count


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first", [False, True], ids=["shortcut last", "shortcut first"])
def test_blocks(first, dtype, device, monkeypatch):
    model, exact, call = ready(lambda: narrow(bottleneck(16, first=first), bottleneck()), device, dtype)
    with taking(2, monkeypatch):
        assert_step_follows(call, model, exact, images(device, dtype), bound(dtype, depth(model)))


PATTERNS = {
    "two blocks": (lambda: narrow(bottleneck(), bottleneck()), 2),
    "projection": (lambda: narrow(bottleneck(16)), 1),
    "nobody reads the result": (lambda: sequential(bottleneck(16, outer=F.relu6), bottleneck(outer=lambda x: x)), 2),
    "no residual": (
        lambda: sequential(conv_norm(16, 16), nn.SiLU(), conv_norm(16, 32, 1), nn.Tanh(), conv_norm(32, 16), nn.SiLU()),
        1,
    ),
    "norms without parameters": (
        lambda: sequential(
            conv(16, 16), nn.BatchNorm2d(16, affine=False), nn.Tanh(), conv(16, 32, 1),
            nn.BatchNorm2d(32, affine=False, track_running_stats=False), nn.Tanh(), conv(32, 16),
        ),
        1,
    ),
    "two in a row": (
        lambda: sequential(
            conv_norm(16, 16), nn.SiLU(), conv_norm(16, 32, 1), nn.Tanh(), conv_norm(32, 16, 1), nn.Tanh(), conv(16, 16)
        ),
        1,
    ),
    "last activation of its input": (lambda: narrow(bottleneck(outer=F.silu)), 0),
    "stride": (lambda: sequential(conv_norm(16, 16), nn.SiLU(), conv_norm(16, 32, 1, stride=2), nn.Tanh()), 0),
    "groups": (lambda: sequential(conv_norm(16, 16), nn.SiLU(), conv_norm(16, 32, 1, groups=2), nn.Tanh()), 0),
    "frozen norms": (lambda: frozen(narrow(bottleneck())), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(name, cpu, monkeypatch):
    make, count = PATTERNS[name]
    model, exact, call = ready(make, cpu)
    shape = IMAGES if next(model.parameters()).shape[1] == 16 else (4, 32, 5, 3)
    for _ in range(2):
        with taking(count, monkeypatch):
            assert_step_follows(call, model, exact, images(cpu, shape=shape), bound(torch.float16, depth(model)))


def test_one_norm_in_two_places_runs_in_its_order(cpu):
    """A projection's norm that is also the main branch's: one set of running statistics, updated twice."""

    def make():
        block = bottleneck(16)
        block.shortcut[1] = block.bn3
        return narrow(block)

    model, exact, call = ready(make, cpu)
    assert_step_follows(call, model, exact, images(cpu), bound(torch.float16, depth(model)))


@pytest.mark.parametrize("case", ["NCHW", "float32", "few channels"])
def test_what_it_cannot_take_runs_one_after_the_other(case, cpu, monkeypatch):
    dtype = torch.float32 if case == "float32" else torch.float16
    model, exact, call = ready(lambda: narrow(bottleneck(16), bottleneck()), cpu, dtype)
    x = images(cpu, dtype)
    if case == "NCHW":
        model.to(memory_format=torch.contiguous_format)
        x = x.contiguous()
    if case == "few channels":
        monkeypatch.setattr(operation, "pays", lambda *_: False)
    with taking(0, monkeypatch):
        assert_step_follows(call, model, exact, x, bound(dtype, depth(model)))


def assert_gradients(model, exact, factor=1.0):
    assert_follows(state(model), state(exact), factor * bound(torch.float16, depth(model)))


def both() -> nn.Module:
    return narrow(bottleneck(16), bottleneck())


def test_gradients_accumulate_over_graphs_and_passes(cpu, monkeypatch):
    model, exact, call = ready(both, cpu)
    with taking(4, monkeypatch):
        for found, wanted in losses(call, exact, images(cpu), images(cpu)):
            for each in (found, wanted):
                each.backward(retain_graph=True)
                each.backward()
    assert_gradients(model, exact)


def test_gradients_of_gradients(cpu):
    """In float32 outside of the step: a penalty on the gradient of the input, through every norm."""
    model, exact, call = ready(both, cpu, torch.bfloat16)
    x = images(cpu, torch.bfloat16)
    for net, given in ((call, x), (exact, x.double())):
        given = given.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss(net(given)), given, create_graph=True)
        grad.square().sum().backward()
    assert_follows(state(model), state(exact), 2 * bound(torch.bfloat16, depth(model)))


def test_some_gradients(cpu):
    model, exact, call = ready(both, cpu)
    found, wanted = next(losses(call, exact, images(cpu)))
    for names in (["0.conv3.weight"], ["1.bn3.bias", "0.bn2.weight"], ["1.conv1.weight"], ["0.shortcut.0.weight"]):
        parts = []
        for net, each in ((model, found), (exact, wanted)):
            grads = torch.autograd.grad(each, [net.get_parameter(name) for name in names], retain_graph=True)
            parts.append(dict(zip(names, grads, strict=True)))
        assert_follows(*parts, bound(torch.float16, depth(model)))


def test_parameters_that_need_no_gradient(cpu):
    model, exact, call = ready(both, cpu)
    for net in (model, exact):
        for parameter in (*net[0].parameters(), net[1].conv3.weight, net[1].bn2.weight):
            parameter.requires_grad_(False)
    assert_step_follows(call, model, exact, images(cpu), bound(torch.float16, depth(model)), needs_x=False)


def test_without_gradients_only_the_statistics_change(cpu, monkeypatch):
    model, exact, call = ready(both, cpu)
    x = images(cpu)
    with torch.no_grad(), taking(2, monkeypatch):
        y, wanted = call(x), exact(x.double())
    assert_follows({"y": y} | state(model), {"y": wanted} | state(exact), bound(torch.float16, depth(model)))


def test_autocast(cpu, monkeypatch):
    """Weights of fp32 beside activations in halves, as GradScaler has them."""
    model, exact, call = ready(both, cpu, torch.float32)
    x = images(cpu, torch.float32)
    with taking(2, monkeypatch), torch.autocast("cpu", torch.bfloat16):
        y = call(x)
    grad = torch.randn(y.shape)
    y.backward(grad.to(y.dtype))
    exact(x.double()).backward(grad.double())
    assert all(parameter.grad.dtype is torch.float32 for parameter in model.parameters())
    assert_follows(state(model), state(exact), bound(torch.bfloat16, depth(model)))


def test_checkpointing(cpu, monkeypatch):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = both()

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False)

    model, exact, call = ready(Checkpointed, cpu)
    with taking(4, monkeypatch):  # the backward runs the forward once more
        assert_step_follows(call, model, exact, images(cpu), bound(torch.float16, depth(model)))


def test_skipped_layers(cpu, monkeypatch):
    model, exact, call = ready(both, cpu, options={"skip": ["0.conv3"]})
    with taking(1, monkeypatch):
        assert_step_follows(call, model, exact, images(cpu), bound(torch.float16, depth(model)))


def test_nothing_of_the_convolution_is_saved(cpu):
    """Neither what it reads, nor what it gives: of a block z twice, the first norm's result, and the block's."""
    _, _, call = ready(lambda: narrow(bottleneck(), bottleneck()), cpu)
    x = images(cpu, shape=(4, 32, 5, 3))
    shapes: dict[int, tuple[int, ...]] = {}

    def keep(tensor):
        shapes[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call(x)
    found = list(shapes.values())
    assert found.count((4, 16, 5, 3)) == 2 * 3
    assert found.count((4, 32, 5, 3)) == 1 + 2


@pytest.mark.parametrize("recompute", [None, False])
def test_large_results_are_computed_again_unless_asked_not_to(recompute, cpu, monkeypatch):
    monkeypatch.setattr("gpukern.compiler.steps.LARGE", 4 * 16 * 5 * 3 * 2)
    assert LARGE == 8 * 2**20
    options = {} if recompute is None else {"options": {"recompute": recompute}}
    model, exact, call = ready(lambda: narrow(bottleneck(), bottleneck()), cpu, **options)
    x = images(cpu, shape=(4, 32, 5, 3))
    saved = set()

    def keep(tensor):
        if tensor.shape == (4, 16, 5, 3):
            saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = call(x)
    assert len(saved) == (4 if recompute is None else 6)
    grad = torch.randn_like(y)
    y.backward(grad)
    exact(x.double()).backward(grad.double())
    assert_gradients(model, exact)
