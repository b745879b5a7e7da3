"""Training in one process: batches, optimizers, and going on from a state as if nothing had happened."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

import gpukern
from gpukern.runtime.mode import Mode, force_mode
from models import checkpoint, data
from models.checkpoint import CheckpointError
from models.trainer import OPTIMIZERS, Config, Trainer, accuracy
from tests.models.idx import write_dataset

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return data.load(write_dataset(tmp_path_factory.mktemp("idx"), train=50, held_out=20))


@pytest.fixture(autouse=True)
def reference():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for so little data more only cost time
    with force_mode(Mode.REFERENCE):
        yield
    torch.set_num_threads(threads)


def finish(trainer):
    while not trainer.finished:
        while trainer.position < trainer.steps_per_epoch:
            trainer.step()
        trainer.end_epoch()
    return trainer


def assert_same(first, second):
    weights = second.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in first.model.state_dict().items())
    assert first.losses == second.losses
    assert first.accuracies == second.accuracies


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(1, [1] * 50), (16, [16, 16, 16, 2]), (0, [50]), (50, [50]), (999, [50])]
)
def test_an_epoch_sees_every_sample_once(samples, batch_size, sizes):
    trainer = Trainer(Config(epochs=1, batch_size=batch_size), samples, CPU)
    assert sorted(torch.cat(trainer._batches).tolist()) == list(range(50))
    assert [trainer.step() for _ in range(trainer.steps_per_epoch)] == sizes
    assert len(trainer.losses) == len(sizes)


def test_every_epoch_is_shuffled_anew(samples):
    trainer = Trainer(Config(epochs=2, batch_size=0), samples, CPU)
    first = trainer._batches[0]
    finish(trainer)
    assert not torch.equal(first, trainer._batches[0])
    assert not torch.equal(first, torch.arange(50))


def test_whole_set_is_batch_gradient_descent(samples):
    """``θ := θ − α ∂J/∂θ`` with J the mean loss over all samples, in whatever order."""
    trainer = Trainer(Config(epochs=1, batch_size=0, optimizer="sgd", lr=0.1), samples, CPU)
    model = copy.deepcopy(trainer.model)
    torch.nn.functional.cross_entropy(model(samples.train.images), samples.train.labels).backward()
    trainer.step()
    for before, after in zip(model.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.1 * before.grad)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_learns(samples, optimizer):
    trainer = finish(Trainer(Config(epochs=6, batch_size=10, optimizer=optimizer), samples, CPU))
    assert sum(trainer.losses[-5:]) < 0.5 * sum(trainer.losses[:5])


def test_same_seed_same_weights(samples):
    config = Config(epochs=2, batch_size=16)
    assert_same(finish(Trainer(config, samples, CPU)), finish(Trainer(config, samples, CPU)))
    other = finish(Trainer(Config(epochs=2, batch_size=16, seed=1), samples, CPU))
    assert other.losses != finish(Trainer(config, samples, CPU)).losses


@pytest.mark.parametrize("optimizer, batch_norm", [*((name, False) for name in OPTIMIZERS), ("sgd", True)])
@pytest.mark.parametrize("stop", [0, 3, 4, 6])
def test_resumed_is_uninterrupted(samples, tmp_path, optimizer, batch_norm, stop):
    """At the start, in the middle of an epoch, at its last step before the evaluation, in the second epoch."""
    config = Config(epochs=3, batch_size=16, optimizer=optimizer, batch_norm=batch_norm)
    stopped = Trainer(config, samples, CPU)
    for _ in range(stop):
        if stopped.position == stopped.steps_per_epoch:
            stopped.end_epoch()
        stopped.step()
    checkpoint.save(tmp_path / "checkpoint.pt", stopped.state_dict())
    resumed = Trainer(config, samples, CPU)
    resumed.load_state_dict(checkpoint.load(tmp_path / "checkpoint.pt"))
    assert (resumed.epoch, resumed.position) == (stopped.epoch, stopped.position)
    assert_same(finish(resumed), finish(Trainer(config, samples, CPU)))


def test_resuming_restores_the_number_of_threads(samples):
    state = Trainer(Config(), samples, CPU).state_dict()
    Trainer(Config(), samples, CPU).load_state_dict({**state, "threads": 2})
    assert torch.get_num_threads() == 2


def test_a_training_can_be_prolonged(samples):
    short = finish(Trainer(Config(epochs=1, batch_size=16), samples, CPU))
    prolonged = Trainer(Config(epochs=2, batch_size=16), samples, CPU)
    prolonged.load_state_dict(short.state_dict())
    assert_same(finish(prolonged), finish(Trainer(Config(epochs=2, batch_size=16), samples, CPU)))


TORCHS = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


@pytest.mark.parametrize("optimizer", TORCHS)
def test_checkpoints_of_torchs_optimizers_resume(samples, tmp_path, optimizer):
    """As they were made before gpukern had its own; on a CPU to the same bits."""
    config = Config(epochs=3, batch_size=16, optimizer=optimizer)
    before = Trainer(config, samples, CPU)
    before.optimizer = TORCHS[optimizer](before.model.parameters(), lr=config.lr)
    for _ in range(3):
        before.step()
    checkpoint.save(tmp_path / "checkpoint.pt", before.state_dict())
    resumed = Trainer(config, samples, CPU)
    resumed.load_state_dict(checkpoint.load(tmp_path / "checkpoint.pt"))
    assert_same(finish(resumed), finish(before))


def test_the_optimizers_are_gpukerns(samples):
    assert TORCHS.keys() <= OPTIMIZERS.keys()
    for name in TORCHS:
        optimizer = Trainer(Config(optimizer=name), samples, CPU).optimizer
        assert isinstance(optimizer, gpukern.optim.Optimizer) and isinstance(optimizer, type(_torchs(name)))
        group = optimizer.param_groups[0]
        assert (group.get("momentum", 0), group.get("nesterov", False)) == {
            "momentum": (0.9, False),
            "nesterov": (0.9, True),
        }.get(name, (0, False))


def _torchs(name: str) -> torch.optim.Optimizer:
    return TORCHS[name]([torch.nn.Parameter(torch.zeros(1))])


def test_a_loss_that_is_not_finite_ends_the_training(samples):
    trainer = Trainer(Config(epochs=2, batch_size=25), samples, CPU)
    trainer.step()
    trainer.step()
    trainer.end_epoch()
    with torch.no_grad():
        trainer.model.fc2.bias.fill_(torch.nan)
    trainer.step()
    with pytest.raises(ValueError, match="diverged in epoch 2"):
        trainer.end_epoch()


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (Config(batch_size=8), "batch_size is 8, was 16"),
        (Config(batch_size=16, lr=0.5), "lr is 0.5, was 0.01"),
        (Config(batch_size=16, seed=4), "seed is 4, was 0"),
        (Config(batch_size=16, optimizer="adam"), "optimizer is adam, was momentum"),
        (Config(batch_size=16, epochs=0), "epochs is 0, but 1 are done"),
    ],
)
def test_contradicting_configuration_is_refused(samples, config, problem):
    state = finish(Trainer(Config(epochs=1, batch_size=16), samples, CPU)).state_dict()
    with pytest.raises(CheckpointError, match=problem):
        Trainer(config, samples, CPU).load_state_dict(state)


def test_checkpoints_from_before_batch_norm_resume(samples):
    state = Trainer(Config(), samples, CPU).state_dict()
    del state["config"]["batch_norm"]
    Trainer(Config(), samples, CPU).load_state_dict(state)
    with pytest.raises(CheckpointError, match="batch_norm is True, was"):
        Trainer(Config(batch_norm=True), samples, CPU).load_state_dict(state)


def test_other_data_are_refused(samples, tmp_path):
    other = data.load(write_dataset(tmp_path, train=49, held_out=20))
    with pytest.raises(CheckpointError, match="not the ones it began with"):
        Trainer(Config(), other, CPU).load_state_dict(Trainer(Config(), samples, CPU).state_dict())


@pytest.mark.parametrize("missing", ["model", "optimizer", "shuffle", "losses"])
def test_incomplete_state_is_refused(samples, missing):
    state = Trainer(Config(), samples, CPU).state_dict()
    del state[missing]
    with pytest.raises(CheckpointError, match="does not fit"):
        Trainer(Config(), samples, CPU).load_state_dict(state)


@pytest.mark.parametrize(
    "options", [{"optimizer": "lbfgs"}, {"epochs": -1}, {"batch_size": -1}, {"optimizer": "adam", "momentum": 0.9}]
)
def test_nonsense_is_refused(options):
    with pytest.raises(ValueError):
        Config(**options)


def test_accuracy_is_the_share_of_right_answers(samples):
    class Oracle(torch.nn.Module):
        def forward(self, images):
            assert not self.training
            return torch.nn.functional.one_hot(images[:, 0, 0, 0].long(), 10)

    labels = torch.tensor([1, 2, 3, 4])
    images = torch.tensor([1.0, 2, 3, 9]).view(4, 1, 1, 1)
    assert accuracy(Oracle(), data.Samples(images, labels), batch_size=3) == 0.75
