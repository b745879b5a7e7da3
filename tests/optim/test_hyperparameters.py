"""Hyperparameters are turned into numbers only where they may have changed, and never too seldom."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gpukern.optim as optim
from gpukern.optim._fused import device_tables, rules
from gpukern.optim._fused.hyperparameters import Hyperparameters

NAMES = optim.Adam._names


def group(**changed) -> dict:
    plain = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0, "amsgrad": False, "maximize": False}
    return {"params": [], "decoupled_weight_decay": True, **plain, **changed}


def test_numbers_in_the_order_of_the_rule():
    assert Hyperparameters(NAMES).of(group(lr=torch.tensor(0.5))) == (None, (0.5, 0.9, 0.99, 1e-8, 0.0, 0.0, 0.0, 1.0))
    for kind in (optim.SGD, optim.Adagrad, optim.RMSprop, optim.Adam, optim.AdamW, optim.Lion, optim.LARS, optim.LAMB):
        optimizer = kind([torch.nn.Parameter(torch.zeros(1))])
        _, values = optimizer._hyperparameters.of(optimizer.param_groups[0])
        assert len(values) == len(optimizer._rule.hyperparameters)


def test_what_did_not_change_is_not_made_again():
    groups, numbers = [group(), group(lr=0.3)], Hyperparameters(NAMES)
    first = numbers(groups)
    assert numbers(groups) is first
    groups[1]["lr"] = 0.2
    second = numbers(groups)
    assert second is not first and second[1][1][0] == 0.2 and numbers(groups) is second
    groups.append(group())
    assert len(numbers(groups)) == 3


@pytest.mark.parametrize(
    ("name", "value", "change"),
    [
        ("lr", torch.tensor(0.1), lambda held: held.fill_(0.4)),
        ("betas", [0.1, 0.2], lambda held: held.reverse()),
        ("betas", (torch.tensor(0.1), 0.2), lambda held: held[0].fill_(0.4)),
        ("eps", np.array(0.1), lambda held: held.fill(0.4)),
    ],
    ids=["tensor", "list", "tensor in a tuple", "array"],
)
def test_what_changes_in_place_is_noticed(name, value, change):
    groups, numbers = [group(), group(**{name: value})], Hyperparameters(NAMES)
    before = numbers(groups)
    change(value)
    after = numbers(groups)
    assert after[0] == before[0] and after[1] != before[1]


def test_a_rate_on_a_device_is_passed_on_as_it_is():
    rate = torch.empty((), device="meta")
    groups, numbers = [group(lr=rate)], Hyperparameters(NAMES)
    first = numbers(groups)
    assert first[0][0] is rate and first[0][1][0] == 0.0 and numbers(groups) is first
    groups[0]["lr"] = other = torch.empty((), device="meta")
    assert numbers(groups)[0][0] is other
    with pytest.raises(ValueError, match=r"on meta must be float32, got torch\.float64"):
        numbers.of(group(lr=torch.empty((), device="meta", dtype=torch.float64)))


def test_the_table_of_groups():
    given = [(16, (0.0, *range(1, 8))), (0, (0.5, *range(11, 18)))]
    found = device_tables.groups_table(rules.ADAM, given)
    assert list(found["lr_place"]) == [16, 0] and list(found["lr"]) == [0.0, 0.5]
    for number, name in enumerate(rules.ADAM.hyperparameters[1:], 1):
        assert list(found[name]) == [number, number + 10]


def test_a_group_changed_in_place_between_steps(where):
    owners = [torch.nn.Parameter(torch.ones(3, device=where)) for _ in range(2)]
    rate = torch.tensor(0.5)
    optimizer = optim.SGD([{"params": owners[:1], "lr": rate}, {"params": owners[1:]}], lr=1.0)
    for factor in (1.0, 0.5):
        rate.fill_(0.5 * factor)
        for owner in owners:
            owner.grad = torch.ones_like(owner)
        optimizer.step()
    for owner, value in zip(owners, (0.25, -1.0), strict=True):
        assert torch.equal(owner, torch.full_like(owner, value))


def test_a_sparse_gradient_after_dense_ones(where):
    """Also of one number: the strides of both are the same."""
    for shape in ((), (3,)):
        owner = torch.nn.Parameter(torch.ones(shape, device=where))
        optimizer = optim.SGD([owner], lr=1.0)
        owner.grad = torch.ones_like(owner)
        optimizer.step()
        owner.grad = torch.ones_like(owner).detach().to_sparse()
        optimizer.step()
        assert torch.equal(owner, torch.full_like(owner, -1.0))
