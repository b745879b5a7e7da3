"""Training as people do it: steps of a small ResNet, evaluation between them, averaged copies, saved states."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gpukern.nn as ours
from models.resnet import BasicBlock, Bottleneck, ResNet
from tests.compiler.nets import Block, classifier, conv_norm, sequential
from tests.compiler.training import assert_follows, assert_step_follows, bound, depth, loss, losses, pair, state

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize(("block", "recompute"), [(BasicBlock, False), (Bottleneck, True)])
def test_ten_steps_of_a_resnet(block, recompute, cpu):
    """The losses are torch's in float64. Each step passes its error on to the next, so that they add up."""

    def make() -> ResNet:
        return ResNet(block, (1, 1, 1, 1), classes=5, width=4)

    model, exact, call = pair(make, cpu, fullgraph=True, options={"recompute": recompute})
    optimizer, reference = (torch.optim.SGD(net.parameters(), 0.02, momentum=0.9) for net in (model, exact))
    eps = bound(torch.float32, depth(model))
    labels = torch.arange(4)
    x = torch.randn(4, 3, 32, 32)
    for step in range(1, 11):
        found, wanted = F.cross_entropy(call(x), labels), F.cross_entropy(exact(x.double()), labels)
        error, size = float((found - wanted).detach().abs()), float(wanted.detach())
        assert error <= step * eps * max(1.0, size), step
        for value, each in ((found, optimizer), (wanted, reference)):
            each.zero_grad()
            value.backward()
            each.step()
    assert found < 1  # it learns the four images


def test_training_and_evaluation_in_turn(cpu):
    model, exact, call = pair(classifier, cpu)
    for training in (True, False, True, False):
        model.train(training)
        exact.train(training)
        assert_step_follows(call, model, exact, torch.randn(3, 3, 6, 5), bound(torch.float32, depth(model)))


def test_copies_and_averages(cpu):
    model, exact, call = pair(classifier, cpu)
    average = torch.optim.swa_utils.AveragedModel(call, use_buffers=True)
    copied = copy.deepcopy(call)
    x = torch.randn(3, 3, 6, 5)
    for compiled in (average, copied, call):
        assert_follows({"y": compiled(x)}, {"y": exact(x.double())}, bound(torch.float32, depth(model)))
    assert int(model[1].num_batches_tracked) == int(copied.get_submodule("_orig_mod.1").num_batches_tracked) == 1
    for found, _ in losses(copied, exact, x):
        found.backward()
    assert model[0].weight.grad is None and copied.get_parameter("_orig_mod.0.weight").grad is not None


def test_state_is_that_of_the_model(cpu):
    model, exact, call = pair(classifier, cpu)
    loss(call(torch.randn(3, 3, 6, 5))).backward()
    assert list(model.state_dict()) == list(exact.state_dict())
    assert list(call.state_dict()) == [f"_orig_mod.{name}" for name in model.state_dict()]
    other = classifier()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other[0].weight, model[0].weight)


def test_batches_are_counted_by_one_call(cpu, monkeypatch):
    model, _, call = pair(classifier, cpu)
    x = torch.randn(3, 3, 6, 5)
    call(x)
    seen = []
    add = torch._foreach_add_
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_add_", lambda tensors, number: (seen.append(len(tensors)), add(tensors, number)))
        torch._dynamo.reset()
        call(x)
        call(x)
    counters = [module.num_batches_tracked for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert seen == [len(counters)] * 2
    assert all(int(counter) == 3 for counter in counters)


def test_layers_of_gpukern(cpu):
    """Their operators are read as torch's calls are."""
    layers = [ours.Conv2d(3, 4, 3, bias=False), ours.BatchNormAct2d(4, activation="silu"), ours.Conv2d(4, 2, 1)]
    torch._dynamo.reset()
    model = ours.Sequential(*layers)
    plain = nn.Sequential(*(copy.deepcopy(each) for each in layers)).double()
    call = torch.compile(model, backend="gpukern", fullgraph=True)
    for found, wanted in losses(call, plain, torch.randn(3, 3, 6, 5)):
        found.backward()
        wanted.backward()
    assert_follows(state(model), state(plain), bound(torch.float32, 3))


HOOKS = {
    "result": lambda norm: norm.register_forward_hook(lambda module, given, result: 2 * result),
    "input": lambda norm: norm.register_forward_pre_hook(lambda module, given: (3 * given[0],)),
    "backward": lambda norm: norm.register_full_backward_hook(lambda module, grads, results: (2 * grads[0],)),
    "parameter": lambda norm: norm.weight.register_hook(lambda grad: 2 * grad),
    "gradient of the result": lambda norm: norm.register_forward_hook(
        lambda module, given, result: (result.register_hook(lambda grad: 3 * grad), None)[1]
    ),
    "accumulated": lambda norm: norm.weight.register_post_accumulate_grad_hook(
        lambda weight: (weight.grad.mul_(5), None)[1]
    ),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks(hook, cpu):
    model, exact, call = pair(lambda: sequential(conv_norm(3, 4), Block(4, 4), Block(4, 2)), cpu)
    for net in (model, exact):
        HOOKS[hook](net[2].bn1)
    for found, wanted in losses(call, exact, torch.randn(3, 3, 6, 5)):
        found.backward()
        wanted.backward()
    assert_follows(state(model), state(exact), bound(torch.float32, depth(model)))
