"""A fused model where an ``nn.Module`` is wanted."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import gpukern
from tests.fusion.networks import conv, lively, norm

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("reference_mode"),
]

X = torch.randn(2, 4, 7, 7)


@pytest.fixture(scope="module")
def fused():
    return gpukern.fuse(lively(nn.Sequential(conv(), norm(), nn.ReLU())), X)


def test_a_fused_model_is_a_layer_of_another(fused):
    head = nn.Linear(4, 2)
    whole = nn.Sequential(fused, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()
    assert torch.equal(whole(X), head(fused(X).mean((2, 3))))
    assert list(fused.children()) == [fused.module] and not list(fused.parameters())
    whole(X).sum().backward()
    assert head.weight.grad is not None
    again = pickle.loads(pickle.dumps(copy.deepcopy(whole)))
    assert torch.equal(again(X), whole(X)) and again[0].report == fused.report
    assert torch.equal(nn.DataParallel(fused)(X), fused(X))


def test_its_state_is_that_of_its_buffers(fused):
    state = {name: 2 * each for name, each in fused.state_dict().items()}
    assert state and all(name.startswith("module.network.") for name in state)
    other = copy.deepcopy(fused)
    other.load_state_dict(state)
    # Twice the weights and biases, before a relu.
    assert torch.allclose(other(X), 2 * fused(X), atol=1e-6) and not torch.equal(other(X), fused(X))


@pytest.mark.parametrize("of", [lambda fused: fused, lambda fused: fused.module, lambda fused: nn.Sequential(fused)])
def test_training_and_other_dtypes_are_refused(fused, of):
    given = of(copy.deepcopy(fused))
    assert given.eval() is given and given.to("cpu") is given and given.float() is given
    with pytest.raises(RuntimeError, match="a fused model is for inference, and cannot be trained"):
        given.train()
    for change, dtype in ((nn.Module.half, "float16"), (nn.Module.double, "float64")):
        with pytest.raises(RuntimeError, match=f"fuse the model with dtype=torch.{dtype}"):
            change(given)
    assert not fused.training and torch.equal(copy.deepcopy(fused)(X), fused(X))


def test_its_own_dtype_changes_nothing():
    fused = gpukern.fuse(lively(nn.Sequential(conv(), norm(), nn.ReLU())), X, dtype=torch.bfloat16)
    dtypes = {each.dtype for each in fused.buffers()}
    expected = fused(X.bfloat16())
    assert dtypes == {torch.bfloat16, torch.float32}  # biases are wider
    assert {each.dtype for each in fused.bfloat16().buffers()} == dtypes
    assert torch.equal(fused(X.bfloat16()), expected)


def test_it_moves_to_another_device(fused):
    moved = copy.deepcopy(fused).to("meta")
    assert {each.device.type for each in moved.buffers()} == {"meta"}
    assert moved(X.to("meta")).shape == X.shape


def test_hooks_are_called(fused):
    called = []
    for each in (fused, fused.module):
        handle = each.register_forward_hook(lambda module, inputs, output: called.append(module))
        fused(X)
        handle.remove()
    assert called == [fused, fused.module]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_exporters_and_compilers_take_it(fused):
    exported = torch.export.export(fused, (X,))
    assert torch.allclose(exported.module()(X), fused(X), atol=1e-6)
    assert torch.allclose(torch.compile(fused, backend="eager", fullgraph=True)(X), fused(X), atol=1e-6)
    with pytest.raises(RuntimeError, match=r"not traced by torch\.jit\.trace: use torch\.export"):
        torch.jit.trace(fused, (X,))
