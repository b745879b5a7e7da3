"""What torch's optimizers do around the arithmetic, and what they are known to do wrong."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch

import gpukern.optim as optim
from gpukern.runtime.mode import Mode, mode_of
from tests.device import DEVICE
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
    parameters,
    steps,
    values,
)

of_kernels = pytest.mark.skipif(
    mode_of(torch.empty(0, device=DEVICE)) is Mode.REFERENCE, reason="of launches, and there are none"
)


# ---- gradients that are not there, or are otherwise -----------------------------------------------------------------


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
        with pytest.raises(RuntimeError, match="expanded parameters|single memory location"):
            optimizer.step()
        assert torch.equal(owner, torch.ones_like(owner))


@of_kernels
def test_float64(device):
    owner = torch.nn.Parameter(torch.ones(3, dtype=torch.float64, device=device))
    owner.grad = torch.ones_like(owner)
    with pytest.raises(RuntimeError, match=r"float32, float16 and bfloat16, but got torch\.float64"):
        optim.SGD([owner], lr=0.1).step()


# ---- overflow, scaling, clipping ------------------------------------------------------------------------------------


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


# ---- groups, schedulers, closures, hooks ----------------------------------------------------------------------------


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
