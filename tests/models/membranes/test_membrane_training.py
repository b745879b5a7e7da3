"""Training segmenting networks: objectives, resuming, and what is drawn."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from models import checkpoint
from models.checkpoint import CheckpointError
from models.membranes import objective
from models.membranes.config import Config, settings
from models.membranes.loading import FORMAT, trained
from models.membranes.networks import NETWORKS, Network
from models.membranes.training import Trainer
from tests.models.membranes import synthetic

CPU = torch.device("cpu")
#: Small ones of each: they take a tenth of a second a step. A valid U-Net of depth 1 loses 8 pixels at each side.
SMALL = {
    "unet": Config(width=4, depth=2, dropout=0.2, steps=6, batch_size=2, crop=32),
    "unet-valid": Config("unet-valid", width=4, depth=1, dropout=0.2, steps=6, batch_size=2, crop=32),
    "ciresan": Config("ciresan", width=4, dropout=0.2, steps=6, batch_size=2, crop=12, pixels=64),
}


@pytest.fixture(scope="module")
def volume():
    return synthetic.volume()


@pytest.mark.parametrize("network, precision", [*((name, "fp32") for name in NETWORKS), ("unet", "bf16")])
def test_resumed_training_equals_an_uninterrupted_one(network, precision, volume, tmp_path, reference_mode):
    config = dataclasses.replace(SMALL[network], precision=precision)
    whole = Trainer(config, volume, CPU)
    for _ in range(4):
        whole.step()
    first = Trainer(config, volume, CPU)
    for _ in range(2):
        first.step()
    checkpoint.save(tmp_path / "state.pt", first.state_dict(), FORMAT)
    torch.manual_seed(123)  # whatever happened in between
    second = Trainer(config, volume, CPU)
    second.load_state_dict(checkpoint.load(tmp_path / "state.pt", FORMAT))
    for _ in range(2):
        second.step()
    assert second.losses == whole.losses and len(set(whole.losses)) == 4
    for one, other in ((second.network, whole.network), (second.averaged, whole.averaged)):
        for name, tensor in one.model.state_dict().items():
            assert torch.equal(tensor, other.model.state_dict()[name]), name


@pytest.mark.parametrize("network", ["unet", "ciresan"])
def test_training_lowers_the_loss_and_moves_the_average(network, volume, reference_mode):
    config = dataclasses.replace(SMALL[network], steps=30, lr=0.01, dropout=0.0)
    trainer = Trainer(config, volume, CPU)
    before = {name: tensor.clone() for name, tensor in trainer.averaged.model.state_dict().items()}
    while not trainer.finished:
        trainer.step()
    assert np.mean(trainer.losses[-5:]) < 0.9 * np.mean(trainer.losses[:3])
    after = trainer.averaged.model.state_dict()
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())


def batch(side: int, context: int) -> objective.Batch:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(2, 1, side + 2 * context, side + 2 * context, generator=generator, dtype=torch.float64)
    labels = (torch.rand(2, side, side, generator=generator) < 0.7).long()
    return objective.Batch(images, labels, torch.ones_like(labels, dtype=torch.float64))


def test_pixels_of_crops_give_the_gradient_of_their_patches(reference_mode):
    """The dense network of crops against the network of patches, in float64, on the same balanced pixels."""
    network = Network(dataclasses.replace(SMALL["ciresan"], dropout=0.0, precision="fp64"), CPU)
    crops, gradients, losses = batch(9, network.context), [], []
    for loss_of in (objective.of_pixels, objective.of_patches):
        torch.manual_seed(0)
        network.model.zero_grad(set_to_none=True)
        loss = loss_of(network, crops, 40)
        loss.backward()
        losses.append(loss.item())
        gradients.append([parameter.grad.clone() for parameter in network.model.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for one, other in zip(*gradients, strict=True):
        assert other.norm() > 0
        assert (one - other).norm() <= 1e-12 * other.norm()


def test_balanced_pixels_are_half_membrane_and_never_twice_the_same():
    labels = (torch.rand(2, 30, 30, generator=torch.Generator().manual_seed(0)) < 0.8).long()
    torch.manual_seed(0)
    chosen = objective.balanced(labels, 100)
    assert len(set(chosen.tolist())) == 100
    assert labels.reshape(-1)[chosen].tolist() == [0] * 50 + [1] * 50
    assert len(objective.balanced(torch.ones(1, 4, 4, dtype=torch.long), 100)) == 16
    assert set(objective.balanced(labels, 100).tolist()) != set(chosen.tolist())


def test_a_crop_without_membrane_has_a_finite_loss(reference_mode):
    network = Network(dataclasses.replace(SMALL["ciresan"], precision="fp64"), CPU)
    crops = batch(5, network.context)
    loss = objective.of_pixels(network, crops._replace(labels=torch.ones_like(crops.labels)), 20)
    assert 0 < loss.item() < 10


def test_weighted_loss_is_the_weighted_mean_of_cross_entropies(reference_mode):
    network = Network(dataclasses.replace(SMALL["unet"], dropout=0.0, precision="fp64"), CPU)
    crops = batch(16, 0)
    weights = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = objective.weighted(network, crops._replace(weights=weights))
    log = network.dense(crops.images).log_softmax(1).gather(1, crops.labels[:, None])[:, 0]
    assert loss.item() == pytest.approx(-(log * weights).sum().item() / weights.sum().item(), rel=1e-12)


def test_crops_fit_the_network_and_show_what_their_labels_say(volume, reference_mode):
    for network, config in SMALL.items():
        trainer = Trainer(config, volume, CPU)
        images, labels, weights = trainer._crops(0)
        side = config.crop + 2 * trainer.network.context
        assert images.shape == (2, 1, side, side) and labels.shape == weights.shape == (2, config.crop, config.crop)
        inner = slice(trainer.network.context, side - trainer.network.context)
        seen = images[:, 0, inner, inner]
        # Cells are two deviations brighter than membranes, wherever a crop was turned to.
        assert seen[labels == 1].mean() > seen[labels == 0].mean() + 1, network


@pytest.mark.parametrize(
    "change, said",
    [
        ({"lr": 0.5}, "lr is 0.5, was 0.003"),
        ({"steps": 7}, "steps is 7, was 6"),
        ({"width": 5, "seed": 3}, "width is 5, was 4; seed is 3, was 0"),
    ],
)
def test_another_configuration_does_not_go_on(change, said, volume, reference_mode):
    state = Trainer(SMALL["unet"], volume, CPU).state_dict()
    with pytest.raises(CheckpointError, match=said):
        Trainer(dataclasses.replace(SMALL["unet"], **change), volume, CPU).load_state_dict(state)


def test_other_sections_do_not_go_on(volume, reference_mode):
    state = Trainer(SMALL["unet"], volume, CPU).state_dict()
    with pytest.raises(CheckpointError, match="the sections or labels are not the ones"):
        Trainer(SMALL["unet"], synthetic.volume(seed=1), CPU).load_state_dict(state)


def test_a_checkpoint_without_weights_of_its_network_is_refused(volume, tmp_path, reference_mode):
    state = Trainer(SMALL["unet"], volume, CPU).state_dict()
    state["config"]["width"] = 8
    checkpoint.save(tmp_path / "state.pt", state, FORMAT)
    with pytest.raises(CheckpointError, match=r"state\.pt: the checkpoint does not fit its network"):
        trained(tmp_path / "state.pt", CPU)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"network": "vgg"}, "unknown network 'vgg', expected one of unet, unet-valid, ciresan"),
        ({"sampling": "patches"}, "U-Net takes no patches"),
        ({"crop": 0}, "crop must be positive"),
        ({"lr": float("nan")}, "lr must not be negative"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"seed": -1}, "seed must be from 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        Config(**change)


def test_a_crop_that_the_network_does_not_take_is_refused(volume, reference_mode):
    with pytest.raises(ValueError, match="U-Net takes no crops of 33 pixels: the next larger one has 36"):
        Trainer(dataclasses.replace(SMALL["unet"], crop=33), volume, CPU)


def test_every_preset_is_a_configuration_of_a_fitting_crop():
    for network in NETWORKS:
        for preset in ("cpu", "gpu"):
            config = Config(**settings(network, preset))
            small = dataclasses.replace(config, width=1)
            assert Network(small, CPU).fitting(config.crop) == config.crop, (network, preset)
    with pytest.raises(ValueError, match="unknown preset"):
        settings("unet", "tpu")
