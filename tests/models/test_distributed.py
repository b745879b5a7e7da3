"""Several processes train the network that one would, and what they began any number of them ends."""

from __future__ import annotations

import pytest
import torch

from gpukern.runtime.mode import Mode, force_mode
from models import checkpoint, data
from models.distributed import Group
from models.trainer import Config, Trainer
from tests.models.idx import write_dataset
from tests.processes import in_processes

CPU = torch.device("cpu")
#: In float64 two orders of the same sums differ by 1e-16 times the square root of their terms, at most 1e5 here, in
#: each of some ten layers; a step of training amplifies that by a small factor. Any other mistake, as a batch norm of a
#: part of the batch or a mean of unequal parts, is 1e-3 and more.
BOUND = 1e-11
#: 21 images in batches of 5: parts of 3 and 2, and a last batch of one, of which the second process has nothing.
CONFIG = dict(
    epochs=2, batch_size=5, network="resnet8", width=4, precision="fp64", crop=2, flip=True, lr=0.02, weight_decay=1e-3
)


def load(folder):
    return data.load(folder, as_bytes=True)


def finish(trainer, steps=None):
    """All steps, or so many."""
    while not trainer.finished and steps != 0:
        trainer.step()
        steps = None if steps is None else steps - 1
        if trainer.position == trainer.steps_per_epoch:
            trainer.end_epoch()
    return trainer


def part(rank, folder, steps, options):
    """One of two processes, which stop after ``steps``; resumed where there is a checkpoint."""
    with force_mode(Mode.REFERENCE):
        group = Group(rank, 2)
        trainer = Trainer(Config(**(CONFIG | options)), load(folder), CPU, group=group)
        path = folder / "checkpoint.pt"
        if path.exists():
            trainer.load_state_dict(checkpoint.load(path))
        finish(trainer, steps)
        group.wait()
        if group.first:
            checkpoint.save(path, trainer.state_dict())


@pytest.fixture
def folder(tmp_path):
    return write_dataset(tmp_path, train=21, held_out=9)


def alone(folder, **options):
    return Trainer(Config(**(CONFIG | options)), load(folder), CPU)


def assert_close(state, trainer):
    assert state["losses"].tolist() == pytest.approx(trainer.losses, abs=1e-6)  # kept in float32
    for name, tensor in trainer.model.state_dict().items():
        assert (state["model"][name] - tensor).abs().max() <= BOUND * max(1, tensor.abs().max()), name
    assert state["accuracies"] == trainer.accuracies


@pytest.mark.usefixtures("reference_mode")
@pytest.mark.parametrize("options", [{}, {"freeze": ("layer1", "bn1"), "thaw": 1, "ema": 0.9}], ids=["all", "thawed"])
def test_two_processes_are_one(folder, options):
    in_processes(2, part, folder, None, options)
    assert_close(checkpoint.load(folder / "checkpoint.pt"), finish(alone(folder, **options)))


@pytest.mark.usefixtures("reference_mode")
def test_what_two_began_one_ends_and_the_other_way_round(folder):
    whole = finish(alone(folder))
    in_processes(2, part, folder, 7, {})
    one = alone(folder)
    one.load_state_dict(checkpoint.load(folder / "checkpoint.pt"))
    assert (one.epoch, one.position) == (1, 2)
    assert_close(finish(one).state_dict(), whole)
    begun = finish(alone(folder), 3)
    checkpoint.save(folder / "checkpoint.pt", begun.state_dict())
    in_processes(2, part, folder, None, {})
    assert_close(checkpoint.load(folder / "checkpoint.pt"), whole)
