"""What torch's optimizers do around the arithmetic: groups, schedulers, closures, hooks."""

from __future__ import annotations

import copy

import pytest
import torch

import gpukern.optim as optim
from tests.optim.cases import (
    ADAM,
    KNOWN,
    Case,
    close,
    give_gradients,
    made,
    of_kernels,
    parameters,
    steps,
    values,
)


def test_groups_with_different_options_in_one_launch(device):
    first, second = parameters(device=device), parameters(device=device, seed=1)
    groups = [{"params": first, "lr": 0.1, "amsgrad": True}, {"params": second, "weight_decay": 0.1, "maximize": True}]
    optimizer = optim.Adam(groups, lr=0.01)
    twins = [[torch.nn.Parameter(value) for value in values(owners)] for owners in (first, second)]
    exact = torch.optim.Adam([{**group, "params": own} for group, own in zip(groups, twins, strict=True)], lr=0.01)
    for number in range(3):
        for owners in (first, second, *twins):
            give_gradients(owners, number)
        optimizer.step()
        exact.step()
    assert close((*first, *second), (*twins[0], *twins[1]))
    assert len(optimizer._step._parts) == 1
    assert "max_exp_avg_sq" in optimizer.state[first[0]] and "max_exp_avg_sq" not in optimizer.state[second[0]]


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_scheduler(as_tensor, where):
    optimizer, owners = made(Case("SGD", {"lr": torch.tensor(0.1, device=where) if as_tensor else 0.1}), where)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for rate in (0.1, 0.05, 0.025):
        before = values(owners)
        steps(optimizer, owners, 0)
        scheduler.step()
        moved = [before - rate * owner.grad for before, owner in zip(before, owners, strict=True)]
        assert close(owners, moved)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("case", [Case("SGD", {"lr": 0.1}), *KNOWN[1:]], ids=str)
def test_a_parameter_that_a_group_has_twice_is_updated_twice(case, where):
    """SGD without momentum: torch's makes a buffer for each of the two."""
    owners = parameters(device=where)
    twins = [torch.nn.Parameter(value) for value in values(owners)]
    optimizer, exact = case.ours([*owners, owners[0]], **case.options), case.torchs([*twins, twins[0]], **case.options)
    for number in range(3):
        give_gradients(owners, number)
        give_gradients(twins, number)
        optimizer.step()
        exact.step()
    assert close(owners, twins)
    # Not both in one launch, where they would be in each other's way.
    assert all(len({id(e.owner) for e in p.entries}) == len(p.entries) for p in optimizer._step._parts)


def test_an_option_switched_on_later(where):
    optimizer, owners = made(Case("RMSprop"), where)
    steps(optimizer, owners, 0)
    optimizer.param_groups[0]["momentum"] = 0.9
    optimizer.param_groups[0]["centered"] = True
    steps(optimizer, owners, 1)
    assert {"momentum_buffer", "grad_avg", "square_avg", "step"} == set(optimizer.state[owners[0]])


def test_a_group_added_later(where):
    optimizer, owners = made(ADAM, where)
    steps(optimizer, owners, 0)
    more = parameters(device=where, seed=2)
    before = values(more)
    optimizer.add_param_group({"params": more, "lr": 0.1})
    steps(optimizer, [*owners, *more], 1)
    assert not any(torch.equal(a, b) for a, b in zip(before, more, strict=True) if a.numel())
    assert optimizer.state[owners[0]]["step"] == 2 and optimizer.state[more[0]]["step"] == 1


def test_a_closure(where):
    optimizer, (owner, *_) = made(Case("SGD", {"lr": 0.1}), where)

    def closure():
        optimizer.zero_grad()
        loss = (owner**2).sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_hooks(where):
    optimizer, owners = made(ADAM, where)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    steps(optimizer, owners, 0)
    assert seen == ["before", "after"]


@of_kernels
def test_more_tensors_than_one_launch_has_room_for(device):
    owners = [torch.nn.Parameter(torch.full((3,), float(n), device=device)) for n in range(4100)]
    for owner in owners:
        owner.grad = torch.ones_like(owner)
    optimizer = optim.SGD(owners, lr=1.0, max_grad_norm=1e9)
    optimizer.step()
    assert len(optimizer._step._parts) == 2
    assert all(torch.equal(owner, torch.full_like(owner, n - 1.0)) for n, owner in enumerate(owners))


@pytest.mark.parametrize("shapes", [[], [(0,)], [(0,), (0, 3)]], ids=str)
def test_nothing_to_update(shapes, where):
    owners = [torch.nn.Parameter(torch.zeros(shape, device=where)) for shape in shapes]
    owners.append(torch.nn.Parameter(torch.ones(2, device=where)))
    optimizer = optim.Adam(owners, max_grad_norm=1.0)
    optimizer.step()
    for owner in owners[:-1]:
        owner.grad = torch.zeros_like(owner)
    optimizer.step()
    assert all(optimizer.state[owner]["step"] == 1 for owner in owners[:-1]) and owners[-1] not in optimizer.state


def test_autograd_notices_the_update(where):
    optimizer, (owner, *_) = made(ADAM, where)
    y = (owner**2).sum()
    owner.grad = torch.ones_like(owner)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_inside_a_compiled_training_step(where):
    model = torch.nn.Linear(3, 2, device=where)
    twin = copy.deepcopy(model)
    x = torch.randn(4, 3, device=where)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    compiled = torch.compile(step, backend="eager")
    for each, run in ((model, compiled), (twin, step)):
        optimizer = optim.Adam(each.parameters(), lr=0.1)
        for _ in range(3):
            run(each, optimizer)
    assert close(model.parameters(), twin.parameters())
    torch.compiler.reset()
