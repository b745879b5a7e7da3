from __future__ import annotations

import pytest
import torch

import gpukern
from gpukern.runtime.mode import Mode, force_mode
from models.lenet import LeNet5


def test_runs_on_gpukerns_layers():
    weighted = [layer for layer in LeNet5() if list(layer.parameters())]
    assert {type(layer) for layer in weighted} == {gpukern.nn.Conv2d, gpukern.nn.Linear}
    with force_mode(Mode.REFERENCE):
        assert LeNet5()(torch.randn(3, 1, 28, 28)).shape == (3, 10)


@pytest.mark.parametrize(("layer", "inputs", "gain"), [("conv2", 20 * 25, 2), ("fc1", 2450, 2), ("fc2", 500, 1)])
def test_initial_weights_are_kaimings(layer, inputs, gain):
    weight = LeNet5().get_submodule(layer).weight
    assert weight.std().item() == pytest.approx((gain / inputs) ** 0.5, rel=0.06)
    assert weight.mean().item() == pytest.approx(0, abs=0.1 * weight.std().item())
    assert not LeNet5().get_submodule(layer).bias.any()


def test_initial_activations_keep_their_scale():
    """What the initialisation is for: no layer's outputs vanish or explode."""
    x = torch.randn(16, 1, 28, 28)
    with force_mode(Mode.REFERENCE), torch.no_grad():
        for layer in LeNet5():
            x = layer(x)
            assert 0.2 < x.square().mean().sqrt() < 5


def test_batch_norm_takes_the_place_of_the_biases_before_it():
    torch.manual_seed(0)
    ours, theirs = LeNet5(batch_norm=True), LeNet5(torch.nn, batch_norm=True)
    assert [name for name, _ in ours.named_parameters() if "bias" in name] == [
        "bn1.bias",
        "bn2.bias",
        "bn3.bias",
        "fc2.bias",
    ]
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 1, 28, 28)
    with force_mode(Mode.REFERENCE):
        for model in (ours, theirs):
            model(x)
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_seed_decides_the_weights():
    torch.manual_seed(3)
    first = LeNet5().state_dict()
    torch.manual_seed(3)
    assert all(torch.equal(first[name], tensor) for name, tensor in LeNet5().state_dict().items())
