"""States of optimizers: to and from torch, through files, copies and pickles, and what does not fit."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from tests.optim.cases import (
    ADAM,
    FULL,
    KNOWN,
    MOMENTUM,
    close,
    equal,
    give_gradients,
    made,
    steps,
    values,
)


@pytest.mark.parametrize("case", KNOWN, ids=str)
@pytest.mark.parametrize("from_torch", [False, True], ids=["to torch", "from torch"])
def test_states_go_both_ways_in_the_middle_of_a_training(case, from_torch, where):
    _, owners = made(case, where)
    twins = [torch.nn.Parameter(value) for value in values(owners)]
    ours, theirs = case.ours(owners, **case.options), case.torchs(twins, **case.options, foreach=False)
    for number in range(3):
        steps(ours, owners, number)
        steps(theirs, twins, number)
    ours_state, theirs_state = ours.state_dict(), theirs.state_dict()
    assert _form(ours_state) == _form(theirs_state)
    if from_torch:
        ours.load_state_dict(_saved(theirs_state))
    else:
        theirs.load_state_dict(_saved(ours_state))
    for number in range(3, 6):
        steps(ours, owners, number)
        steps(theirs, twins, number)
    assert close(owners, twins)


def _form(state_dict):
    """Keys and shapes."""
    states = {n: {k: tuple(v.shape) for k, v in held.items()} for n, held in state_dict["state"].items()}
    return states, [set(group) for group in state_dict["param_groups"]]


def _saved(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("case", FULL, ids=str)
@pytest.mark.parametrize("through", ["state_dict", "deepcopy", "pickle"])
def test_a_training_goes_on_bit_for_bit(case, through, where):
    optimizer, owners = made(case, where, torch.bfloat16, master_weights=True, state_dtype=torch.float32)
    steps(optimizer, owners, 0, 1)
    if through == "state_dict":
        twins = [torch.nn.Parameter(value) for value in values(owners)]
        other = case.ours(twins, **case.options, master_weights=True)
        other.load_state_dict(_saved(optimizer.state_dict()))
    elif through == "deepcopy":
        other = copy.deepcopy(optimizer)
    else:
        other = pickle.loads(pickle.dumps(optimizer))
    twins = other.param_groups[0]["params"]
    steps(optimizer, owners, 2, 3)
    steps(other, twins, 2, 3)
    assert equal(owners, twins) and twins[0] is not owners[0]
    for owner, twin in zip(owners, twins, strict=True):
        for name, held in optimizer.state[owner].items():
            assert torch.equal(held, other.state[twin][name]) and held.dtype == other.state[twin][name].dtype


def test_a_buffer_that_nothing_is_in_is_saved_as_none(where):
    optimizer, owners = made(MOMENTUM, where)
    give_gradients(owners, 0)
    optimizer.found_inf = torch.ones((), device=where)
    optimizer.step()
    assert all(held == {"momentum_buffer": None} for held in optimizer.state_dict()["state"].values())
    del optimizer.found_inf
    other, twins = made(MOMENTUM, where)
    other.load_state_dict(_saved(optimizer.state_dict()))
    for each, own in ((optimizer, owners), (other, twins)):
        steps(each, own, 1, 2)
    assert equal(owners, twins)


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda d: d["param_groups"].append(d["param_groups"][0]), ValueError),
        (lambda d: d["param_groups"][0]["params"].pop(), ValueError),
        (lambda d: d["state"][0].update(exp_avg=torch.zeros(3, 5)), ValueError),
        (lambda d: d["state"][0].update(step="three"), ValueError),
        (lambda d: d.pop("state"), KeyError),
    ],
    ids=["groups", "parameters", "shape", "step", "no state"],
)
def test_a_bad_state_changes_nothing(damage, error, where):
    optimizer, owners = made(ADAM, where)
    other, twins = made(ADAM, where)
    steps(optimizer, owners, 0)
    steps(other, twins, 0)
    bad = copy.deepcopy(optimizer.state_dict())
    damage(bad)
    with pytest.raises(error):
        optimizer.load_state_dict(bad)
    steps(optimizer, owners, 1)
    steps(other, twins, 1)
    assert equal(owners, twins)


def test_loading_keeps_the_dtype_of_the_state(where):
    optimizer, owners = made(ADAM, where, torch.bfloat16, state_dtype=torch.float32)
    steps(optimizer, owners, 0)
    for more, dtype in (({}, torch.float32), ({"state_dtype": torch.float16}, torch.float16)):
        other, twins = made(ADAM, where, torch.bfloat16, **more)
        other.load_state_dict(_saved(optimizer.state_dict()))
        steps(other, twins, 1)
        assert other.state[twins[0]]["exp_avg"].dtype is dtype


def test_hooks_of_loading_see_what_is_loaded(where):
    optimizer, owners = made(ADAM, where, torch.bfloat16, state_dtype=torch.float32)
    steps(optimizer, owners, 0)
    saved, seen = _saved(optimizer.state_dict()), []
    optimizer.register_load_state_dict_pre_hook(lambda _, d: {**d, "state": {}})
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(dict(o.state)))
    optimizer.load_state_dict(saved)
    assert seen == [{}]
