"""Memory saved on the way: checkpoints inside a model and around it, and hooks on what autograd saves."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.compiler.nets import Block, Net, classifier, conv_norm, sequential
from tests.compiler.training import assert_follows, bound, depth, loss, losses, pair, state

pytestmark = pytest.mark.usefixtures("poisoned", "full_fp32")

SHAPE = 3, 4, 6, 5


def assert_backward(model, exact, call, x):
    for found, wanted in losses(call, exact, x):
        found.backward()
        wanted.backward()
    assert_follows(state(model), state(exact), bound(torch.float32, depth(model)))


def three_blocks(middle) -> Net:
    def forward(net, x):
        return net.last(middle(net.middle, net.first(x)))

    return Net(forward, first=Block(), middle=Block(), last=Block(4, 2))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_inside(reentrant, cpu):
    """Running statistics are updated twice, as torch does."""
    inside = functools.partial(checkpoint, use_reentrant=reentrant)
    assert_backward(*pair(lambda: three_blocks(inside), cpu), torch.randn(SHAPE))


def test_checkpoint_inside_by_the_kernels(device):
    inside = functools.partial(checkpoint, use_reentrant=False)
    x = torch.randn(SHAPE, device=device)
    assert_backward(*pair(lambda: three_blocks(inside), device, fullgraph=True), x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_around(reentrant, cpu):
    model, exact, call = pair(lambda: sequential(conv_norm(4, 4), Block(), Block(4, 2)), cpu)
    around = functools.partial(checkpoint, use_reentrant=reentrant)
    for net, leaf in ((call, torch.randn(SHAPE)),):
        exact_leaf = leaf.double().requires_grad_()
        loss(around(net, leaf.requires_grad_())).backward()
        loss(around(exact, exact_leaf)).backward()
    assert_follows(state(model), state(exact), bound(torch.float32, depth(model)))


def test_dropout_draws_the_same_mask_again(cpu):
    def dropped(block, x):
        return checkpoint(lambda each: F.dropout(block(each), 0.5), x, use_reentrant=False)

    model, _, call = pair(lambda: three_blocks(dropped), cpu, fullgraph=True)
    eager, x = copy.deepcopy(model), torch.randn(SHAPE)
    for net in (call, eager):
        torch.manual_seed(0)
        loss(net(x)).backward()
    assert_follows(state(model), state(eager), 2 * bound(torch.float32, depth(model)))


def test_selective_checkpoint(cpu):
    def save_convolutions(context, operator, *arguments, **named):
        kept = "convolution" in str(operator) or "conv2d" in str(operator)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, save_convolutions)
    inside = functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)
    model, exact, call = pair(lambda: three_blocks(inside), cpu, fullgraph=True)
    for found, wanted in losses(call, exact, torch.randn(SHAPE)):
        found.backward()
        wanted.backward()
    found, wanted = ({k: v for k, v in state(net).items() if "gradient" in k} for net in (model, exact))
    assert_follows(found, wanted, bound(torch.float32, depth(model)))


@pytest.mark.parametrize("recompute", [False, True])
def test_saved_tensors_elsewhere(recompute, cpu):
    """Hooks get what autograd saves, and what they return is used."""
    model, exact, call = pair(classifier, cpu, options={"recompute": recompute})
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.clone()

    x = torch.randn(3, 3, 6, 5)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = loss(call(x))
    assert packed
    found.backward()
    loss(exact(x.double())).backward()
    assert_follows(state(model), state(exact), bound(torch.float32, depth(model)))


def test_recompute_saves_fewer_results(cpu):
    """Of each norm followed by convolutions alone, the result is not kept."""
    kept = []
    for recompute in (False, True):
        make = functools.partial(sequential, conv_norm(4, 4), nn.SiLU(), conv_norm(4, 4), nn.SiLU(), nn.Conv2d(4, 2, 1))
        _, _, call = pair(make, cpu, options={"recompute": recompute})
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = call(torch.randn(SHAPE))
        kept.append(sum(storages.values()))
        del result
    assert kept[0] - kept[1] == 2 * 4 * 3 * 4 * 6 * 5


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode(cpu):
    model, exact, call = pair(classifier, cpu)
    with torch.autograd.detect_anomaly():
        assert_backward(model, exact, call, torch.randn(3, 3, 6, 5))
