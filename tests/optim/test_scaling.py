"""Overflow, scaling and clipping of gradients inside a step."""

from __future__ import annotations

import pytest
import torch

import gpukern.optim as optim
from tests.optim.cases import (
    ADAM,
    FULL,
    MOMENTUM,
    Case,
    close,
    equal,
    give_gradients,
    made,
    parameters,
    steps,
    values,
)


@pytest.mark.parametrize("case", FULL, ids=str)
@pytest.mark.parametrize("found", [1.0, 2.0])
def test_a_skipped_step_freezes_everything(case, found, where):
    """torch sums found_inf over devices and tests for 1; and leaves garbage where the first step is skipped."""
    optimizer, owners = made(case, where)
    other, twins = made(case, where)
    before = values(owners)
    for number in (0, 1, 2):
        give_gradients(owners, number)
        optimizer.found_inf = torch.full((), found if number != 1 else 0.0, device=where)
        optimizer.step()
        if number == 0:
            assert equal(owners, before)
    del optimizer.found_inf
    steps(other, twins, 1)
    assert equal(owners, twins)
    steps(optimizer, owners, 3)
    steps(other, twins, 3)
    assert equal(owners, twins)


def test_grad_scaler(where):
    if where.type == "cuda":
        pytest.skip("the same on a device needs the scaler of that device")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    optimizer, owners = made(MOMENTUM, where)
    other, twins = made(MOMENTUM, where)
    for number in range(4):
        for owner in owners:
            owner.grad = None
        weights = [torch.randn(owner.shape, generator=torch.Generator().manual_seed(number)) for owner in owners]
        loss = sum((owner * weight).sum() for owner, weight in zip(owners, weights, strict=True))
        scaler.scale(loss * (torch.inf if number == 2 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        if number != 2:
            for twin, weight in zip(twins, weights, strict=True):
                twin.grad = weight.expand(twin.shape).contiguous()
            other.step()
    assert scaler.get_scale() == 2.0**9
    assert close(owners, twins)


@pytest.mark.parametrize("case", FULL, ids=str)
@pytest.mark.parametrize("limit", [0.5, 100.0, 1e6])  # the norm is about 68
def test_clipping_by_norm(case, limit, where):
    optimizer, owners = made(case, where, max_grad_norm=limit)
    other, twins = made(case, where)
    for number in range(3):
        give_gradients(owners, number)
        give_gradients(twins, number)
        kept = [owner.grad.clone() for owner in owners]
        optimizer.step()
        norm = torch.nn.utils.clip_grad_norm_(twins, limit)
        other.step()
        assert torch.allclose(optimizer.grad_norm, norm, rtol=1e-6)
        assert equal([owner.grad for owner in owners], kept)
    assert close(owners, twins)


def test_clipping_of_scaled_gradients_and_not_of_those_that_are_none(where):
    optimizer, owners = made(ADAM, where, max_grad_norm=0.5)
    give_gradients(owners, 0)
    norm = torch.nn.utils.get_total_norm([owner.grad for owner in owners[1:]])
    for owner in owners:
        owner.grad.mul_(64)
    owners[0].grad = None
    optimizer.grad_scale = torch.full((), 64.0, device=where)
    optimizer.step()
    assert torch.allclose(optimizer.grad_norm, norm, rtol=1e-6)


def test_the_norm_is_of_all_launches(where):
    halves, owners = parameters(torch.bfloat16, where), parameters(torch.float32, where)
    give_gradients(halves, 1)
    give_gradients(owners, 0)
    expected = torch.nn.utils.get_total_norm([owner.grad.float() for owner in (*halves, *owners)])
    optimizer = optim.SGD([*halves, *owners], lr=1.0, max_grad_norm=0.25)
    before = values(owners)
    optimizer.step()
    assert torch.allclose(optimizer.grad_norm, expected, rtol=1e-6)
    moved = [(old - new) / (0.25 / expected) for old, new in zip(before, owners, strict=True)]
    assert all(torch.allclose(m, o.grad, rtol=1e-3, atol=1e-4) for m, o in zip(moved, owners, strict=True))


def test_a_norm_that_is_nan_reaches_all(where):
    """As with clip_grad_norm_, so that nothing looks trained that is not."""
    optimizer, owners = made(Case("SGD", {"lr": 0.1}), where, max_grad_norm=1.0)
    give_gradients(owners, 0)
    owners[0].grad[0, 0, 0] = torch.nan
    optimizer.step()
    assert optimizer.grad_norm.isnan() and all(owner.isnan().all() for owner in owners)


def test_clipping_by_value(where):
    optimizer, owners = made(ADAM, where, max_grad_value=0.5)
    other, twins = made(ADAM, where)
    for number in range(2):
        give_gradients(owners, number)
        give_gradients(twins, number)
        torch.nn.utils.clip_grad_value_(twins, 0.5)
        optimizer.step()
        other.step()
    assert equal(owners, twins)
    owners[0].grad.fill_(torch.nan)
    optimizer.step()
    assert owners[0].isnan().all()


def test_lion_has_no_direction_at_zero(where):
    owner = torch.nn.Parameter(torch.ones(5, device=where))
    owner.grad = torch.zeros_like(owner)
    optim.Lion([owner], lr=0.1).step()
    assert torch.equal(owner.detach(), torch.ones_like(owner))
