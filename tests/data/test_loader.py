"""Batches: each sample once an epoch, however many processes share them, and where a stopped epoch goes on."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from gpukern.data import Augment, Loader
from gpukern.data.order import permutation
from gpukern.runtime.mode import Mode, force_mode

pytestmark = pytest.mark.usefixtures("reference_mode")
COUNT = 23
IMAGES = torch.arange(COUNT, dtype=torch.uint8).view(COUNT, 1, 1, 1).expand(COUNT, 4, 4, 3).contiguous()
LABELS = torch.arange(COUNT)


def labels(loader) -> list[list[int]]:
    batches = []
    for images, batch in loader:
        assert torch.equal(images[:, 0, 0, 0].long(), batch)
        batches.append(batch.tolist())
    return batches


def flat(batches) -> list[int]:
    return [each for batch in batches for each in batch]


@pytest.mark.parametrize("batch_size", [1, 5, 23, 40])
def test_every_sample_comes_once_an_epoch(batch_size):
    loader = Loader(IMAGES, LABELS, batch_size)
    orders = [labels(loader) for _ in range(3)]
    assert all(sorted(flat(each)) == list(range(COUNT)) and len(each) == len(loader) for each in orders)
    assert len({str(flat(each)) for each in orders}) == 3
    assert [len(batch) for batch in orders[0]][:-1] == [batch_size] * (len(loader) - 1)
    assert labels(Loader(IMAGES, LABELS, batch_size)) == orders[0]
    assert labels(Loader(IMAGES, LABELS, batch_size, seed=1)) != orders[0]
    in_order = Loader(IMAGES, LABELS, batch_size, shuffle=False)
    assert [flat(labels(in_order)) for _ in range(2)] == [list(range(COUNT))] * 2
    short = Loader(IMAGES, LABELS, batch_size, drop_last=True)
    assert [len(batch) for batch in labels(short)] == [batch_size] * len(short) and len(short) == COUNT // batch_size


def test_orders_are_random():
    """The mean of each place, over many orders, within six standard deviations; no two epochs or seeds alike."""
    orders = torch.stack([permutation(9, seed, epoch, LABELS.device) for seed in (0, -7) for epoch in range(300)])
    assert torch.equal(orders.sort(1).values, torch.arange(9).expand(600, 9))
    assert ((orders.double().mean(0) - 4).abs() < 6 * math.sqrt(60 / 9 / 600)).all()
    assert len(orders[:, :6].unique(dim=0)) > 590


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_processes_share_the_batches_of_one(world_size):
    """With batches as large in all: of 6, 6, 6 and 5 samples, the last shared as evenly as can be."""
    ranks = [Loader(IMAGES, LABELS, 30 // world_size, rank=r, world_size=world_size) for r in range(world_size)]
    (whole,) = labels(Loader(IMAGES, LABELS, 30))
    shares = [labels(each) for each in ranks]
    assert {len(each) for each in shares} == {1} and len({len(batch) for (batch,) in shares}) == 1
    assert flat(flat(shares))[:COUNT] == whole and set(flat(flat(shares))) == set(whole)
    once = [
        Loader(IMAGES, LABELS, 30 // world_size, rank=r, world_size=world_size, even=False) for r in range(world_size)
    ]
    assert sorted(flat(flat(map(labels, once)))) == list(range(COUNT))
    assert [len(labels(each)) for each in once] == [len(each) for each in once]


def test_uneven_shares_may_be_empty():
    ranks = [Loader(IMAGES[:9], LABELS[:9], 2, rank=r, world_size=4, even=False) for r in range(4)]
    assert [len(labels(each)) for each in ranks] == [len(each) for each in ranks] == [2, 1, 1, 1]
    even = [Loader(IMAGES[:9], LABELS[:9], 2, rank=r, world_size=4) for r in range(4)]
    assert [len(flat(labels(each))) for each in even] == [3] * 4


def test_state_goes_on_at_the_next_batch():
    loader, seen, states = Loader(IMAGES, LABELS, 5, seed=4), [], []
    for _ in range(2):
        for _, batch in loader:
            seen.append(batch.tolist())
            states.append(loader.state_dict())
        states[-1] = copy.copy(loader.state_dict())
    for done, state in enumerate(states, 1):
        resumed = Loader(IMAGES, LABELS, 5)
        resumed.load_state_dict(state)
        rest = []
        for epoch in range(resumed.epoch, 2):
            resumed.set_epoch(epoch)
            rest += labels(resumed)
        assert rest == seen[done:], state
    with pytest.raises(ValueError, match="after 24 samples"):
        resumed.load_state_dict({"seed": 0, "epoch": 0, "samples": 24})


def test_state_goes_on_with_another_number_of_processes():
    loaders = [Loader(IMAGES, LABELS, 3, rank=r, world_size=2) for r in range(2)]
    iterator = zip(*loaders, strict=True)
    first = [batch.tolist() for _ in range(2) for _, batch in next(iterator)]
    states = [each.state_dict() for each in loaders]
    assert states[0] == states[1] == {"seed": 0, "epoch": 0, "samples": 12}
    alone = Loader(IMAGES, LABELS, 4)
    alone.load_state_dict(states[0])
    assert sorted(flat(first) + flat(labels(alone))) == list(range(COUNT))


def test_an_iterator_left_behind_does_not_count():
    loader = Loader(IMAGES, LABELS, 5)
    first, second = iter(loader), None
    next(first)
    second = iter(loader)
    next(second), next(first), next(first)
    assert loader.state_dict() == {"seed": 0, "epoch": 1, "samples": 5}


@pytest.mark.parametrize(
    "state", [{}, None, {"seed": 0, "epoch": "one", "samples": 3}, {"seed": 0, "epoch": 1.5, "samples": 3}]
)
def test_what_is_no_state_is_refused_and_changes_nothing(state):
    loader = Loader(IMAGES, LABELS, 5, seed=3)
    with pytest.raises(ValueError, match="whole numbers as seed, epoch, samples"):
        loader.load_state_dict(state)
    assert loader.state_dict() == {"seed": 3, "epoch": 0, "samples": 0}


def test_an_epoch_left_early_is_over():
    loader = Loader(IMAGES, LABELS, 5)
    whole = [labels(loader) for _ in range(2)]
    loader.set_epoch(0)
    _, first = next(iter(loader))
    assert first.tolist() == whole[0][0]
    assert labels(loader) == whole[1] and loader.epoch == 2
    loader.set_epoch(0)
    assert labels(loader) == whole[0]


def test_samples_do_not_depend_on_batches_or_processes():
    images = torch.randint(256, (COUNT, 6, 6, 3), dtype=torch.uint8)
    augment = Augment(6, 2, True, 2, 0.5, 0.25, seed=5)

    def made(*loaders) -> dict[int, torch.Tensor]:
        pairs = [pair for loader in loaders for pair in loader]
        return {int(label): image for batch, numbers in pairs for image, label in zip(batch, numbers, strict=True)}

    whole = made(Loader(images, LABELS, 23, transform=augment))
    for loaders in (
        [Loader(images, LABELS, 4, transform=augment)],
        [Loader(images, LABELS, 4, transform=augment, rank=r, world_size=3) for r in range(3)],
        [Loader(images, LABELS, 4, transform=augment, shuffle=False)],
    ):
        other = made(*loaders)
        assert all(torch.equal(other[label], image) for label, image in whole.items())
    loader = Loader(images, LABELS, 23, transform=augment)
    list(loader)
    later = made(loader)
    assert sum(not torch.equal(later[label], image) for label, image in whole.items()) > 18
    assert augment.step == 0


def test_kernels_gather_the_same(device):
    images = torch.randint(256, (9, 5, 5, 3), dtype=torch.uint8)
    made = []
    for mode, where in ((Mode.REFERENCE, torch.device("cpu")), (None, device)):
        augment = Augment(5, 1, True, 2, 0.5, 0.25).to(where)
        with force_mode(mode):  # type: ignore[arg-type]
            made.append([x.cpu() for x in Loader(images.to(where), None, 4, transform=augment)])
    assert all(map(torch.equal, *made))


def test_other_transforms_get_the_batch():
    loader = Loader(IMAGES, None, 4, transform=lambda batch: batch.float().mean((1, 2, 3)), shuffle=False)
    assert torch.cat(list(loader)).tolist() == list(range(COUNT))
    assert next(iter(Loader(IMAGES, None, 4))).dtype is torch.uint8


def test_batches_go_to_another_device():
    augment = Augment(4, 1, True).to("meta")
    images, numbers = next(iter(Loader(IMAGES, LABELS, 4, transform=augment, device="meta")))
    assert images.is_meta and numbers.is_meta and images.shape == (4, 3, 4, 4)


def test_processes_are_those_of_torch_distributed(monkeypatch):
    distributed = torch.distributed
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_rank", lambda: 2)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 3)
    loader = Loader(IMAGES, LABELS, 4)
    assert (loader.rank, loader.world_size, len(loader)) == (2, 3, 2)
    assert labels(loader) == labels(Loader(IMAGES, LABELS, 4, rank=2, world_size=3))
    alone = Loader(IMAGES, LABELS, 4, rank=0, world_size=1)
    assert (alone.rank, alone.world_size) == (0, 1)


@pytest.mark.gpu
def test_host_memory_reaches_a_gpu(device):
    images = torch.randint(256, (COUNT, 6, 6, 3), dtype=torch.uint8)
    augment = Augment(6, 2, True, 2, 0.5, 0.25, torch.float16).to(device)
    with force_mode(None):  # type: ignore[arg-type]
        there = list(Loader(images.to(device), LABELS.to(device), 5, transform=augment))
        here = list(Loader(images, LABELS, 5, transform=augment, device=device))
    assert all(
        torch.equal(a, b) for one, other in zip(there, here, strict=True) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"batch_size": 0}, ValueError, "at least 1"),
        ({"batch_size": 2.0}, TypeError, "batch_size"),
        ({"rank": 1}, ValueError, "1 of 1"),
        ({"rank": -1, "world_size": 2}, ValueError, "-1 of 2"),
        ({"labels": LABELS[1:]}, RuntimeError, "a label for each of 23 images"),
        ({"labels": LABELS.to("meta")}, RuntimeError, "on meta"),
        ({"labels": [1, 2]}, TypeError, "expected a Tensor or None"),
        ({"images": [1, 2]}, TypeError, "expected a Tensor"),
    ],
)
def test_options_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        Loader(**({"images": IMAGES, "labels": LABELS, "batch_size": 4} | options))


def test_nothing_has_no_batches():
    loader = Loader(IMAGES[:0], LABELS[:0], 4)
    assert len(loader) == 0 and list(loader) == []
