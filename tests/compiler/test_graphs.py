"""What Dynamo hands over: several graphs for one model, free sizes, control flow; options, and refusals."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from gpukern.compiler import backend, steps
from tests.compiler.nets import Block, Net, classifier, conv, conv_norm, sequential
from tests.compiler.training import (
    assert_follows,
    assert_step_follows,
    bound,
    calls_of,
    depth,
    losses,
    pair,
    state,
)

SHAPE = 3, 4, 6, 5


def blocks(forward) -> Net:
    return Net(forward, first=Block(), second=Block(), third=Block(4, 2))


def between(net, x):
    y = net.first(x)
    torch._dynamo.graph_break()
    return net.third(net.second(y))


def in_a_group(net, x):
    y = net.first.conv1(x)
    torch._dynamo.graph_break()
    y = F.silu(net.first.bn1(y))
    z = net.first.conv2(y)
    torch._dynamo.graph_break()
    return net.first.bn2(z) + y


def printed(net, x):
    y = net.second(net.first(x))
    print("", end="")
    return net.third(y)


@pytest.mark.parametrize("forward", [between, in_a_group, printed])
def test_graph_breaks(forward, cpu, monkeypatch):
    model, exact, call = pair(lambda: blocks(forward), cpu)
    with calls_of("compile_graph", monkeypatch, backend) as calls:
        assert_step_follows(call, model, exact, torch.randn(SHAPE), bound(torch.float32, depth(model)))
    assert len(calls) > 1


def test_a_branch_by_the_shape(cpu):
    def forward(net, x):
        y = net.first(x)
        return net.third(net.second(y) if x.shape[0] > 3 else y)

    model, exact, call = pair(lambda: blocks(forward), cpu, fullgraph=True)
    for batch in (3, 4, 3, 5):
        x = torch.randn(batch, 4, 6, 5)
        assert_step_follows(call, model, exact, x, bound(torch.float32, depth(model)))


def test_control_flow(cpu):
    """What is inside of branches is torch's, what is around them gpukern's."""

    def forward(net, x):
        y = net.first(x)
        filters, others = net.second.conv1.weight, net.second.conv2.weight
        y = torch.cond(
            y.sum() > 0,
            lambda t: F.silu(F.conv2d(t, filters, padding=1)),
            lambda t: F.silu(F.conv2d(t, others, padding=1)),
            (y,),
        )
        return net.third(y)

    model, exact, call = pair(lambda: blocks(forward), cpu, fullgraph=True)
    for found, wanted in losses(call, exact, torch.randn(SHAPE)):
        found.backward()
        wanted.backward()
    assert_follows(state(model), state(exact), bound(torch.float32, depth(model)))


def one_group() -> nn.Module:
    return sequential(conv_norm(3, 4), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


@pytest.mark.parametrize("how", ["all free", "automatic", "marked", "fixed"])
def test_batches_of_other_sizes(how, cpu, monkeypatch):
    free = {"all free": {"dynamic": True}, "fixed": {"dynamic": False}}
    model, exact, call = pair(one_group, cpu, fullgraph=True, **free.get(how, {}))
    with calls_of("compile_graph", monkeypatch, backend) as calls:
        for batch in (7, 4, 9, 2):
            x = torch.randn(batch, 3, 6, 5)
            if how == "marked":
                torch._dynamo.mark_dynamic(x, 0)
            for found, wanted in losses(call, exact, x):
                found.backward()
                wanted.backward()
    assert_follows(state(model), state(exact), bound(torch.float32, depth(model)))
    assert len(calls) == {"all free": 1, "automatic": 2, "marked": 1, "fixed": 4}[how]


def test_images_of_other_sizes(cpu):
    model, exact, call = pair(classifier, cpu, fullgraph=True, dynamic=True)
    for size in ((6, 5), (7, 5), (9, 8)):
        x = torch.randn(3, 3, *size)
        assert_step_follows(call, model, exact, x, bound(torch.float32, depth(model)))


def test_another_autograd_function(cpu):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.tanh(x) * 2

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return 2 * grad * (1 - torch.tanh(x).square())

    model, exact, call = pair(lambda: blocks(lambda net, x: net.third(Doubled.apply(net.first(x)))), cpu)
    assert_step_follows(call, model, exact, torch.randn(SHAPE), bound(torch.float32, depth(model)))


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_value_per_channel_is_refused_and_changes_nothing(dynamic, cpu):
    def make() -> nn.Module:
        return sequential(conv_norm(3, 4), nn.SiLU(), nn.AdaptiveAvgPool2d(1), conv_norm(4, 4, 1))

    raised = []
    for name in ("aot_eager", "gpukern"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = make()
        call = torch.compile(model, backend=name, dynamic=dynamic)
        if dynamic:
            call(torch.randn(3, 3, 5, 5))
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(Exception, match="Expected more than 1 value per channel") as error:
            call(torch.randn(1, 3, 5, 5))
        raised.append(type(error.value))
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert raised[0] is raised[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fast": True}, "gpukern has no option 'fast'; there are: skip, recompute"),
        ({"skip": "layer1"}, "skip: expected a sequence of module paths, but got 'layer1'"),
        ({"skip": [1]}, "skip: expected a sequence of module paths, but got [1]"),
        ({"recompute": 1}, "recompute: expected a bool, but got 1"),
    ],
)
def test_options_that_gpukern_does_not_have(options, message, cpu):
    call = torch.compile(classifier(), backend="gpukern", options=options)
    with pytest.raises(BackendCompilerFailed, match=re.escape(f"TypeError: {message}")):
        call(torch.randn(3, 3, 6, 5))


def test_modes(cpu):
    x = torch.randn(3, 3, 6, 5)
    assert torch.compile(classifier(), backend="gpukern", mode="default")(x).shape == (3, 3)
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="ValueError: gpukern has no mode 'max-autotune'"):
        torch.compile(classifier(), backend="gpukern", mode="max-autotune")(x)


def test_skipped_modules_are_torchs(cpu, monkeypatch):
    """Whole groups: a skipped convolution leaves its norm to itself, a skipped block all of its own."""
    counts = {}
    for skip in ((), ("0",), ("3",), ("3.conv*", "4.bn?"), ("*",)):
        model, exact, call = pair(classifier, cpu, options={"skip": skip})
        with calls_of("convolution", monkeypatch, steps) as convolutions, calls_of("norm", monkeypatch, steps) as norms:
            assert_step_follows(call, model, exact, torch.randn(3, 3, 6, 5), bound(torch.float32, depth(model)))
        counts[skip] = len(convolutions), len(norms)
    assert counts == {(): (6, 6), ("0",): (5, 6), ("3",): (4, 4), ("3.conv*", "4.bn?"): (2, 4), ("*",): (0, 0)}


def test_the_backend_is_found_by_name(run_python):
    """In an interpreter that imported nothing of gpukern."""
    code = """
import sys, torch
assert not any(name.startswith("gpukern") for name in sys.modules)
assert "gpukern" in torch._dynamo.list_backends()
net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
torch.compile(net, backend="gpukern")(torch.randn(2, 3, 5, 5)).sum().backward()
assert "gpukern.compiler.backend" in sys.modules
print(float(net[0].weight.grad.isfinite().all()))
"""
    done = run_python(code)
    assert done.stdout.strip() == "1.0", done.stderr


def test_random_networks(cpu):
    """Layers in any order, with results kept for later additions. No norm follows another at once: γ would be lost."""
    generator = torch.Generator().manual_seed(0)

    def pick(number: int) -> int:
        return int(torch.randint(number, (), generator=generator))

    for _ in range(3):
        choices = [(pick(6), pick(3), pick(3)) for _ in range(7)]

        def forward(net, x, choices=choices):
            kept = [x]
            for place, (kind, act, other) in enumerate(choices):
                x = net.get_submodule(f"layer{place}")(x)
                if kind > 3:
                    x = x + kept[other % len(kept)]
                x = (F.silu, torch.tanh, F.gelu)[act](x)
                kept.append(x)
            return x, kept[-2]

        def make(forward=forward, choices=choices) -> Net:
            def layer(kind: int) -> nn.Module:
                kinds = [conv(4, 4)], [nn.BatchNorm2d(4)], conv_norm(4, 4, 1), conv_norm(4, 4, groups=2)
                return nn.Sequential(*kinds[min(kind, 3)])

            return Net(forward, **{f"layer{place}": layer(kind) for place, (kind, _, _) in enumerate(choices)})

        model, exact, call = pair(make, cpu, fullgraph=True)
        for found, wanted in losses(call, exact, torch.randn(SHAPE)):
            found.backward()
            wanted.backward()
        assert_follows(state(model), state(exact), 2 * bound(torch.float32, depth(model)))
