"""Backward passes: several over one graph, parts of one, recorded ones. Nothing is left from one to the next."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpukern.compiler import autograd, origin
from tests.compiler.nets import Block, Net, classifier, conv, conv_norm, read_by_three, sequential
from tests.compiler.training import (
    assert_follows,
    bound,
    depth,
    loss,
    losses,
    named,
    pair,
    state,
)

pytestmark = pytest.mark.usefixtures("poisoned", "full_fp32")

SHAPE = 3, 3, 6, 5


def blocks() -> nn.Module:
    """A block, whose result is read by the two convolutions of another."""
    return sequential(conv_norm(3, 4), nn.Tanh(), Block(4, 2))


def assert_gradients(model, exact, factor=1.0):
    """``factor``: errors that add up, of several passes or orders."""
    assert_follows(state(model), state(exact), factor * bound(torch.float32, depth(model)))


def test_gradients_accumulate(cpu):
    model, exact, call = pair(classifier, cpu)
    for found, wanted in losses(call, exact, torch.randn(SHAPE), torch.randn(SHAPE)):
        found.backward()
        wanted.backward()
    assert_gradients(model, exact)


def test_one_backward_of_two_forwards(cpu):
    model, exact, call = pair(classifier, cpu)
    pairs = list(losses(call, exact, torch.randn(SHAPE), torch.randn(SHAPE)))
    for which in (0, 1):
        (pairs[0][which] - 2 * pairs[1][which]).backward()
    assert_gradients(model, exact)


def test_one_graph_three_times(where):
    model, exact, call = pair(blocks, where)
    for each in next(losses(call, exact, torch.randn(SHAPE, device=where))):
        each.backward(retain_graph=True)
        each.backward(retain_graph=True)
        each.backward()
    assert_gradients(model, exact)


@pytest.mark.parametrize("recompute", [False, True])
def test_some_gradients_then_all(recompute, cpu):
    """Passes that stop on the way, so that some readers of a result never return its gradient."""
    model, exact, call = pair(lambda: read_by_three(0, 1, 2), cpu, options={"recompute": recompute})
    some = (["conv3.weight"], ["conv4.weight", "bn2.bias"], ["conv1.weight"], ["bn1.weight", "plain.bias"])
    found, wanted = next(losses(call, exact, torch.randn(3, 4, 6, 5)))
    for paths in some:
        parts = []
        for net, each in ((model, found), (exact, wanted)):
            parameters = [net.get_parameter(path) for path in paths]
            parts.append(named(str(paths), list(torch.autograd.grad(each, parameters, retain_graph=True))))
        assert_follows(*parts, bound(torch.float32, depth(model)))
    found.backward()
    wanted.backward()
    assert_gradients(model, exact)


def test_results_that_are_not_used(cpu):
    """Of three that read one result, those of two get no gradient, in turn."""
    model, exact, call = pair(lambda: read_by_three(0, 1, 2), cpu)
    x = torch.randn(3, 4, 6, 5)
    results, expected = call(x), exact(x.double())
    for place in (2, 0, 1):
        loss(results[place]).backward(retain_graph=True)
        loss(expected[place]).backward(retain_graph=True)
    assert_gradients(model, exact)


def test_a_pass_that_fails_on_the_way(cpu):
    model, exact, call = pair(classifier, cpu)
    found, wanted = next(losses(call, exact, torch.randn(SHAPE)))

    def fail(grad):
        raise ValueError("no")

    handle = model.get_parameter("3.conv1.weight").register_hook(fail)
    with pytest.raises(ValueError, match="no"):
        found.backward(retain_graph=True)
    handle.remove()
    model.zero_grad()
    found.backward()
    wanted.backward()
    assert_gradients(model, exact)


def run_here(work: Callable[[], None]) -> None:
    work()


def run_in_a_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.mark.parametrize("run", [run_here, run_in_a_thread])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")  # the cycle ends at zero_grad
def test_a_pass_inside_another(run, recompute, recorded, cpu):
    """One that begins when some readers of a result have left its gradient, and others have not."""
    model, exact, call = pair(lambda: read_by_three(0, 1, 2), cpu, options={"recompute": recompute})
    found, wanted = next(losses(call, exact, torch.randn(3, 4, 6, 5)))
    for path in ("bn3.weight", "conv3.weight", "bn2.weight", "conv4.weight"):
        for net, value in ((model, found), (exact, wanted)):
            net.zero_grad()
            begun: list[None] = []

            def hook(grad, value=value, begun=begun):
                if not begun:
                    begun.append(None)
                    with torch.enable_grad():
                        run(lambda: value.backward(retain_graph=True, create_graph=recorded))

            handle = net.get_parameter(path).register_hook(hook)
            value.backward(retain_graph=True)
            handle.remove()
            assert begun
        assert_gradients(model, exact)


def test_what_a_pass_computes_again_is_not_kept(cpu):
    """Where it ends before the batch norm whose result that is; the loss is still there."""
    model, _, call = pair(lambda: read_by_three(0, 1), cpu, options={"recompute": True})
    value = loss(call(torch.randn(3, 4, 6, 5)))
    computed: list[weakref.ref] = []

    def watched(*arguments, original=origin.made):
        tensor = original(*arguments)
        computed.append(weakref.ref(tensor))
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autograd, "made", watched)
        torch.autograd.grad(value, model.get_parameter("conv4.weight"))
    assert computed
    assert all(each() is None for each in computed)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_penalty(recompute, cpu):
    """What a recorded pass uses has gradients of its own, beside those of its readers."""
    model, exact, call = pair(classifier, cpu, options={"recompute": recompute})
    x = torch.randn(SHAPE)
    for net, leaf in ((call, x), (exact, x.double())):
        leaf = leaf.clone().requires_grad_()
        value = loss(net(leaf))
        (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
        (value + grad.square().sum()).backward()
    assert_gradients(model, exact, 4)


def test_second_derivatives_after_a_first_pass(where):
    model, exact, call = pair(blocks, where)
    x = torch.randn(SHAPE, device=where)
    for net, leaf in ((call, x), (exact, x.cpu().double())):
        leaf = leaf.clone().requires_grad_()
        value = loss(net(leaf))
        value.backward(retain_graph=True)
        (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
        grad.square().sum().backward(retain_graph=True)
        value.backward()
    assert_gradients(model, exact, 4)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context, where):
    model, exact, call = pair(blocks, where)
    for training in (True, False, True):
        model.train(training)
        exact.train(training)
        x = torch.randn(SHAPE, device=where)
        with context():
            found, wanted = call(x), exact(x.cpu().double())
        assert not found.requires_grad
        assert_follows({"y": found} | state(model), {"y": wanted} | state(exact), bound(torch.float32, depth(model)))
    for found, wanted in losses(call, exact, x):
        found.backward()
        wanted.backward()
    assert_gradients(model, exact)


def a_part(net, x):
    with torch.no_grad():
        x = net.block(x)
    return net.after(x)


def the_start_of_a_group(net, x):
    with torch.no_grad():
        y = net.conv(x)
    return net.last(torch.tanh(y + x))


def the_end_of_a_group(net, x):
    y = net.conv(x)
    with torch.no_grad():
        z = net.norm(y)
    return torch.tanh(net.after(y) + z)


def one_of_two_readers(net, x):
    y = F.silu(net.norm(net.conv(x)))
    with torch.no_grad():
        z = net.after(y)
    return torch.tanh(net.last(y) + z)


def an_activation_in_place(net, x):
    """The norm's gradient is that of no activation."""
    y = net.norm(net.conv(x))
    with torch.no_grad():
        y = F.relu(y, inplace=True)
    return torch.tanh(net.after(y))


def a_detached_reader(net, x):
    y = F.silu(net.norm(net.conv(x)))
    return net.last(y) + net.after(y.detach()) + net.after(y).detach()


@pytest.mark.parametrize(
    "forward",
    [a_part, the_start_of_a_group, the_end_of_a_group, one_of_two_readers, an_activation_in_place, a_detached_reader],
)
def test_no_grad_inside(forward, cpu):
    def make() -> nn.Module:
        first, norm = conv_norm(4, 4)
        return Net(forward, block=Block(), conv=first, norm=norm, after=conv(4, 4), last=conv(4, 4))

    model, exact, call = pair(make, cpu)
    for found, wanted in losses(call, exact, torch.randn(3, 4, 6, 5)):
        found.backward()
        wanted.backward()
    assert_gradients(model, exact)


def test_transforms_of_functions(cpu):
    model, exact, call = pair(lambda: sequential(Block(), Block(4, 8)).eval(), cpu)
    x, tangent = torch.randn(3, 4, 6, 5), torch.randn(3, 4, 6, 5)
    eps = bound(torch.float32, depth(model))
    doubles = x.double(), tangent.double()
    found = torch.func.jvp(call, (x,), (tangent,))
    wanted = torch.func.jvp(exact, doubles[:1], doubles[1:])
    assert_follows(named("jvp", list(found)), named("jvp", list(wanted)), eps)

    def of_one(image):
        return model(image[None])[0]

    vmapped = torch.func.vmap(torch.compile(of_one, backend="gpukern"))(x)
    assert_follows({"vmap": vmapped}, {"vmap": exact(doubles[0])}, eps)


def test_a_compiled_backward_pass(cpu):
    model, exact, call = pair(blocks, cpu)
    found, wanted = next(losses(call, exact, torch.randn(SHAPE)))
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        found.backward()
    wanted.backward()
    assert_gradients(model, exact)
