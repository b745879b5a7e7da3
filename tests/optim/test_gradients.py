"""Gradients that are not there, are late, lie otherwise than their parameters or are sparse."""

from __future__ import annotations

import weakref

import pytest
import torch

import gpukern.optim as optim
from tests.optim.cases import (
    ADAM,
    FULL,
    KNOWN,
    MOMENTUM,
    Case,
    close,
    equal,
    give_gradients,
    made,
    of_kernels,
    steps,
    values,
)


@pytest.mark.parametrize("case", KNOWN, ids=str)
def test_no_gradient_leaves_parameter_state_and_step(case, where):
    optimizer, owners = made(case, where)
    twins = [torch.nn.Parameter(value) for value in values(owners)]
    exact = case.torchs(twins, **case.options, foreach=False)
    for number in range(4):
        give_gradients(owners, number)
        # The first is late, the fourth pauses twice: torch counts the updates of each.
        owners[0].grad = owners[0].grad if number > 1 else None
        owners[3].grad = None if number in (1, 2) else owners[3].grad
        for twin, owner in zip(twins, owners, strict=True):
            twin.grad = None if owner.grad is None else owner.grad.clone()
        optimizer.step()
        exact.step()
    assert close(owners, twins)


def test_a_late_gradient_with_momentum(where):
    optimizer, owners = made(MOMENTUM, where)
    give_gradients(owners, 0)
    owners[0].grad = None
    optimizer.step()
    before = values(owners)
    give_gradients(owners, 1)
    optimizer.step()
    # Its first gradient is taken whole, without dampening.
    assert torch.allclose(owners[0], before[0] - 0.1 * owners[0].grad)


def test_gradients_in_another_layout(where):
    for case in FULL:
        optimizer, owners = made(case, where)
        other, twins = made(case, where)
        for number in range(3):
            give_gradients(owners, number)
            give_gradients(twins, number)
            for twin in twins:
                # Assigned as they are: .grad's setter does not look at strides.
                backwards = tuple(reversed(range(twin.dim())))
                twin.grad = twin.grad.permute(backwards).contiguous().permute(backwards)
            optimizer.step()
            other.step()
        # A norm is summed in the order of the memory.
        assert close(owners, twins) if case.name in ("LARS", "LAMB") else equal(owners, twins), case


@of_kernels
def test_gradients_of_one_element_wide_dimensions_are_not_copied(device):
    owner = torch.nn.Parameter(torch.randn(4, 3, 1, 1, device=device))
    owner.grad = torch.randn(4, 3, 1, 1, device=device).contiguous(memory_format=torch.channels_last)
    optimizer = optim.SGD([owner], lr=0.1)
    optimizer.step()
    (part,) = optimizer._step._parts
    assert not part._substituted


def test_parameters_with_gaps(where):
    for case in FULL:
        whole = torch.randn(6, 10, device=where)
        owner = torch.nn.Parameter(whole[:, ::2])
        twin = torch.nn.Parameter(whole[:, ::2].clone())
        optimizers = [case.ours([each], **case.options) for each in (owner, twin)]
        rest = whole[:, 1::2].clone()
        for _ in range(3):
            twin.grad = torch.randn(6, 5, device=where)
            owner.grad = torch.empty_like(owner).copy_(twin.grad)
            for optimizer in optimizers:
                optimizer.step()
        assert torch.allclose(owner, twin, rtol=1e-6) and torch.equal(whole[:, 1::2], rest), case


def test_gradients_changed_in_place_or_replaced(where):
    optimizer, owners = made(ADAM, where)
    other, twins = made(ADAM, where)
    give_gradients(owners, 0)
    give_gradients(twins, 0)
    for number in range(3):
        for owner, twin in zip(owners, twins, strict=True):
            owner.grad.mul_(0.5)
            twin.grad.data = twin.grad * 0.5 if number == 1 else twin.grad.mul_(0.5)
        optimizer.step()
        other.step()
    assert equal(owners, twins)


def test_gradients_whose_data_gets_another_layout(where):
    optimizer, owners = made(ADAM, where)
    other, twins = made(ADAM, where)
    give_gradients(owners, 0)
    give_gradients(twins, 0)
    for number in range(3):
        if number == 1:
            for twin in twins:
                backwards = tuple(reversed(range(twin.dim())))
                twin.grad.data = twin.grad.permute(backwards).contiguous().permute(backwards)
        optimizer.step()
        other.step()
    assert equal(owners, twins)


@pytest.mark.parametrize("more", [{}, {"max_grad_norm": 1.0}], ids=str)
def test_gradients_are_given_up_by_zero_grad(more, where):
    """Kept by the optimizer they would take their memory a second time during the next backward."""
    optimizer, owners = made(ADAM, where, **more)
    for number in range(3):
        give_gradients(owners, number)
        owners[1].grad = None if number == 1 else owners[1].grad
        memory = [weakref.ref(owner.grad) for owner in owners if owner.grad is not None]
        optimizer.step()
        optimizer.step()
        optimizer.zero_grad()
        assert all(reference() is None for reference in memory)


@pytest.mark.parametrize("first", [0, 1])
def test_a_gradient_that_goes_away_while_others_stay(first, where):
    optimizer, owners = made(ADAM, where)
    give_gradients(owners, 0)
    owners[6].grad = None if first else owners[6].grad
    optimizer.step()
    before = values(owners)
    owners[0].grad = None
    optimizer.step()
    moved = [not torch.equal(owner, value) for owner, value in zip(owners, before, strict=True) if owner.numel()]
    assert not moved[0] and all(moved[1:5]) and moved[5] is not bool(first)


@of_kernels
def test_gradients_that_stay_are_not_looked_at_again(device, monkeypatch):
    optimizer, owners = made(ADAM, device)
    give_gradients(owners, 0)
    owners[1].grad = None
    optimizer.step()
    (part,) = optimizer._step._parts
    looked = []
    monkeypatch.setattr(part, "_checked", lambda: looked.append(1))
    for owner in owners:
        if owner.grad is not None:
            owner.grad.mul_(0.5)
    optimizer.step()
    assert optimizer._step._parts == [part] and not looked


def test_parameters_whose_data_is_replaced(where):
    optimizer, owners = made(ADAM, where)
    other, twins = made(ADAM, where)
    for number in range(3):
        steps(optimizer, owners, number)
        steps(other, twins, number)
        for twin in twins:
            twin.data = twin.data.clone(memory_format=torch.preserve_format)
    assert equal(owners, twins)


@pytest.mark.parametrize("case", [Case("SGD", {"lr": 0.1, "momentum": 0.9}), Case("Adagrad")], ids=str)
def test_sparse_gradients_as_torch_takes_them(case, where):
    owner = torch.nn.Parameter(torch.randn(6, 3, device=where))
    twin = torch.nn.Parameter(owner.detach().clone())
    optimizer, exact = case.ours([owner], **case.options), case.torchs([twin], **case.options)
    for number in range(3):
        indices = torch.tensor([[number, 4]], device=where)
        gradient = torch.sparse_coo_tensor(indices, torch.randn(2, 3, device=where), (6, 3))
        owner.grad, twin.grad = gradient, gradient.clone()
        optimizer.step()
        exact.step()
    assert torch.allclose(owner, twin, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "Lion", "LARS", "LAMB"])
def test_sparse_gradients_that_torch_refuses(name, where):
    owner = torch.nn.Parameter(torch.zeros(3, device=where))
    owner.grad = torch.zeros(3, device=where).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        getattr(optim, name)([owner]).step()


def test_what_is_refused_changes_nothing(where):
    good = torch.nn.Parameter(torch.ones(3, device=where))
    bad = torch.nn.Parameter(torch.ones(3, device=where, dtype=torch.complex64))
    good.grad, bad.grad = torch.ones_like(good), torch.ones_like(bad)
    with pytest.raises(RuntimeError, match="complex"):
        optim.SGD([good, bad], lr=0.1).step()
    assert torch.equal(good, torch.ones_like(good))


def test_elements_that_share_memory(where):
    owner = torch.nn.Parameter(torch.ones(1, 3, device=where).expand(4, 3))
    owner.grad = torch.ones(4, 3, device=where)
    for optimizer in (optim.Adam([owner]), torch.optim.Adam([owner])):
        with pytest.raises(RuntimeError, match=r"expanded parameters|single memory location"):
            optimizer.step()
        assert torch.equal(owner, torch.ones_like(owner))


@of_kernels
def test_float64(device):
    owner = torch.nn.Parameter(torch.ones(3, dtype=torch.float64, device=device))
    owner.grad = torch.ones_like(owner)
    with pytest.raises(RuntimeError, match=r"float32, float16 and bfloat16, but got torch\.float64"):
        optim.SGD([owner], lr=0.1).step()
