"""Options of a training: each does what it says, and with all of them a resumed training is the uninterrupted one."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from gpukern.runtime.mode import Mode, force_mode
from models import checkpoint, running, train
from models import trainer as trainer_module
from models.config import Config
from models.data import Data, Samples
from models.metrics import Metrics
from models.running import make_console, run, save_plots
from models.trained import network
from models.trainer import Trainer

CPU = torch.device("cpu")
SMALL = dict(network="resnet8", width=4, batch_size=8)


@pytest.fixture(autouse=True)
def reference():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for so little data more only cost time
    with force_mode(Mode.REFERENCE):
        yield
    torch.set_num_threads(threads)


def bright(count, seed):
    """Images [N, 12, 12, 3] of which one colour, the label, is bright."""
    random = np.random.RandomState(seed)
    labels = np.arange(count) % 3
    images = random.randint(0, 120, (count, 12, 12, 3)).astype(np.uint8)
    images[np.arange(count), :, :, labels] += 100
    return Samples(torch.from_numpy(images), torch.from_numpy(labels))


@pytest.fixture(scope="module")
def data():
    parts = bright(27, 0), bright(12, 1)
    return Data(None, "bright", *parts, "f", "bright", ("red", "green", "blue"), (80.0,) * 3, (40.0,) * 3)


def finish(trainer, steps=None):
    """To the end, or until so many steps are done."""
    while not trainer.finished and (steps is None or trainer.steps_done < steps):
        trainer.step()
        if trainer.position == trainer.steps_per_epoch:
            trainer.end_epoch()
    return trainer


ALL = dict(
    epochs=3, schedule="cosine", warmup=0.5, weight_decay=1e-3, dropout=0.2, label_smoothing=0.1, ema=0.9,
    crop=2, flip=True, cutout=3, mixup=0.4, lr=0.05,
)  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("stop", [3, 6])
def test_resumed_with_everything_is_uninterrupted(data, tmp_path, precision, stop):
    config = Config(**SMALL, **ALL, precision=precision, optimizer="adamw")
    whole = finish(Trainer(config, data, CPU))
    checkpoint.save(tmp_path / "c.pt", finish(Trainer(config, data, CPU), stop).state_dict())
    resumed = Trainer(config, data, CPU)
    resumed.load_state_dict(checkpoint.load(tmp_path / "c.pt"))
    finish(resumed)
    assert resumed.losses == whole.losses and resumed.history == whole.history
    for ours, theirs in ((resumed.model, whole.model), (resumed.average.model, whole.average.model)):
        weights = theirs.state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize(
    "option",
    [
        {"crop": 2}, {"flip": True}, {"cutout": 4}, {"mixup": 0.5}, {"label_smoothing": 0.2}, {"weight_decay": 0.5},
        {"dropout": 0.5}, {"schedule": "one-cycle"}, {"warmup": 1.0}, {"precision": "bf16"},
        {"lr_scale": (("fc", 0.1),)}, {"freeze": ("layer1",)}, {"image_size": 16},
    ],
    ids=lambda option: next(iter(option)),
)  # fmt: skip
def test_every_option_changes_the_training(data, option):
    plain = finish(Trainer(Config(**SMALL, lr=0.05), data, CPU), 3)
    changed = finish(Trainer(Config(**SMALL, **{"lr": 0.05} | option), data, CPU), 3)
    assert plain.losses != changed.losses


def test_evaluation_sees_images_as_they_are(data):
    config = dict(crop=4, flip=True, cutout=8, mixup=1.0, dropout=0.9)
    trainer = Trainer(Config(**SMALL, **config), data, CPU)
    plain = Trainer(Config(**SMALL), data, CPU)
    plain.model.load_state_dict(trainer.model.state_dict())
    assert trainer._evaluated(data.held_out) == trainer._evaluated(data.held_out) == plain._evaluated(data.held_out)
    assert trainer.model.training and trainer.inputs.training


def test_training_images_looked_at_are_of_all_classes(data, monkeypatch):
    order = torch.argsort(data.train.labels)
    ordered = replace(data, train=Samples(data.train.images[order], data.train.labels[order]))
    trainer, seen = Trainer(Config(**SMALL, epochs=1), ordered, CPU), []
    monkeypatch.setattr(trainer_module, "_LOOKED_AT", 7)
    monkeypatch.setattr(trainer, "_evaluated", lambda samples: seen.append(samples.labels.tolist()) or (1.0, 0.5))
    trainer.end_epoch()
    assert seen[0] == [0, 0, 0, 1, 1, 2, 2] and len(seen[1]) == 12


def test_rates_follow_the_schedule_in_every_group(data):
    trainer = Trainer(Config(**SMALL, lr=0.1, schedule="step", step_epochs=1, gamma=0.5,
                             lr_scale=(("fc", 10.0), ("layer*.0.conv1", 0.0))), data, CPU)  # fmt: skip
    finish(trainer, 5)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.5, 0.0, 0.05]
    before = Trainer(trainer.config, data, CPU).model.layer2[0].conv1.weight
    assert torch.equal(trainer.model.layer2[0].conv1.weight, before)


def test_frozen_layers_stay_as_they_are_until_they_thaw(data):
    config = Config(**SMALL, epochs=2, freeze=("!fc",), thaw=1, lr=0.05)
    start = {name: tensor.clone() for name, tensor in Trainer(config, data, CPU).model.state_dict().items()}
    trainer = Trainer(config, data, CPU)

    def changed():
        return {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, start[name])}

    finish(trainer, 4)
    assert changed() == {"fc.weight", "fc.bias"}, "statistics of frozen batch norms stay too"
    finish(trainer)
    assert {"conv1.weight", "bn1.running_mean", "layer3.0.conv2.weight"} <= changed()


def test_patience_ends_a_training_and_the_best_weights_are_kept(data, tmp_path, monkeypatch):
    results = iter([0.5, 0.75, 0.6, 0.75, 0.1])
    config = Config(**SMALL, epochs=9, patience=2, ema=0.5)
    trainer = Trainer(config, data, CPU)
    monkeypatch.setattr(trainer, "_evaluated", lambda samples: (1.0, next(results) if len(samples) == 12 else 0.9))
    weights = {}
    monkeypatch.setattr(running, "save_best", lambda trainer, path: weights.update({trainer.epoch: path.name}))
    run(trainer, tmp_path / "checkpoint.pt", make_console())
    assert (trainer.epoch, trainer.best_epoch, trainer.finished) == (4, 2, True)
    assert weights == {1: "best.pt", 2: "best.pt"}


def test_what_a_training_leaves_behind(data, tmp_path):
    config = Config(**SMALL, epochs=2, ema=0.5, lr=0.05)
    trainer = Trainer(config, data, CPU)
    run(trainer, tmp_path / "checkpoint.pt", make_console())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == trainer.history
    assert [line["epoch"] for line in lines] == [1, 2] and lines[1]["step"] == 8
    assert {"loss", "lr", "train_accuracy", "held_out_accuracy", "images_per_second"} <= lines[0].keys()
    best = network(checkpoint.load(tmp_path / "best.pt")).eval()
    ended = network(checkpoint.load(tmp_path / "checkpoint.pt"))
    averaged = trainer.average.model.state_dict()
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in ended.state_dict().items())
    images = trainer.inputs.eval()(data.held_out.images)
    share = (best(images).argmax(1) == data.held_out.labels).float().mean().item()
    assert share == pytest.approx(max(trainer.accuracies))
    for path in save_plots(trainer, tmp_path, "t"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
    metrics = Metrics(tmp_path, 0, False)
    for epoch in (1, 2, 3):
        metrics.write({"epoch": epoch, "step": 4 * epoch, "loss": float("nan")})
    with metrics.path.open("a") as file:
        file.write('{"epoch": 4, "st')
    assert [json.loads(line)["epoch"] for line in Metrics(tmp_path, 2, False).path.read_text().splitlines()] == [1, 2]
    assert '"loss": null' in metrics.path.read_text()
    assert not Metrics(tmp_path, 0, False).path.read_text()


def test_tensorboard_has_the_same_numbers(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    metrics = Metrics(tmp_path, 0, True)
    metrics.write({"epoch": 1, "step": 4, "loss": 0.5})
    metrics.close()
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = events.Scalars("loss")
    assert (event.step, event.value) == (4, 0.5)


def test_a_loss_that_overflows_in_fp16_is_scaled(data):
    trainer = Trainer(Config(**SMALL, precision="fp16", lr=0.01), data, CPU)
    before = trainer._scaler.get_scale()
    trainer.step()
    assert trainer._scaler.is_enabled() and before > 1
    assert "scale" in trainer.state_dict()["scaler"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"network": "resnet19"}, "unknown network"),
        ({"network": "unet"}, "unknown network"),
        ({"schedule": "linear"}, "unknown schedule"),
        ({"precision": "int8"}, "unknown precision"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\)"),
        ({"dropout": -0.1}, "dropout must be in"),
        ({"crop": -1}, "crop must not be negative"),
        ({"lr": float("nan")}, "lr must not be negative"),
        ({"width": 0}, "width must be positive"),
        ({"schedule": "one-cycle", "warmup": 1}, "takes no other"),
        ({"thaw": 1}, "nothing to thaw"),
        ({"seed": 2**63}, "seed must have 64 bits"),
    ],
)
def test_nonsense_is_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        Config(**options)


def test_options_that_no_layer_answers_to(data):
    for options, problem in (
        ({"freeze": ("layer9",)}, "no parameter is called 'layer9': there are conv1, bn1, layer1"),
        ({"lr_scale": (("head", 2.0),)}, "no parameter is left for 'head'"),
        ({"freeze": ("*",), "thaw": 1}, r"nothing to train: \* freezes all"),
    ):
        with pytest.raises(ValueError, match=problem):
            Trainer(Config(**SMALL, **options), data, CPU)


def test_the_command_knows_what_suits_a_data_set(monkeypatch, tmp_path):
    found = []

    def stop(config, *rest, **options):
        found.append(config)
        raise ValueError("enough")

    monkeypatch.setattr(train, "Trainer", stop)
    monkeypatch.setattr(train.datasets, "load", lambda *arguments: None)
    for given in ({}, {"optimizer": "sgd", "crop": 0}):
        with pytest.raises(ValueError, match="enough"):
            train.train(given, "mnist5k", tmp_path, "cpu", False, 0, make_console())
    assert (found[0].optimizer, found[0].crop, found[0].lr) == ("adam", 2, 0.001)
    assert (found[1].optimizer, found[1].crop, found[1].schedule) == ("sgd", 0, "cosine")
