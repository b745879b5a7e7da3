"""What the user does to an optimizer's state between steps is what the next step goes on from, as with torch's."""

from __future__ import annotations

import copy
from collections import defaultdict

import pytest
import torch
from torch._subclasses import FakeTensorMode

import gpukern.optim as optim
from gpukern.runtime.mode import Mode, force_mode

KINDS = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adagrad": {"lr": 0.1, "initial_accumulator_value": 0.5},
    "RMSprop": {"lr": 0.1, "momentum": 0.5, "centered": True},
    "Adam": {"lr": 0.1, "amsgrad": True},
    "AdamW": {"lr": 0.1},
}
OWN = {
    "Lion": {"lr": 0.1},
    "LARS": {"lr": 0.1, "momentum": 0.9},
    "LAMB": {"lr": 0.1, "weight_decay": 0.5},
}


@pytest.fixture(params=[Mode.REFERENCE, Mode.EMULATED], ids=lambda mode: mode.value, autouse=True)
def mode(request):
    with force_mode(request.param):
        yield request.param


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (1,), (7,))]


def step(optimizer: torch.optim.Optimizer, number: int) -> None:
    torch.manual_seed(number)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def both(name: str):
    """torch's class and ours, in the middle of a training, of equal parameters."""
    made = [getattr(which, name)(parameters(), **KINDS[name]) for which in (torch.optim, optim)]
    for optimizer in made:
        step(optimizer, 1), step(optimizer, 2)
    return made


def owners(optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def assert_equal(theirs, ours) -> None:
    for one, other in zip(owners(theirs), owners(ours), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    saved, found = theirs.state_dict()["state"], ours.state_dict()["state"]
    assert saved.keys() == found.keys()
    for number, held in saved.items():
        assert held.keys() == found[number].keys()
        for key, value in held.items():
            torch.testing.assert_close(found[number][key], value, rtol=1e-5, atol=1e-6, check_device=False)


def names(held: dict) -> list[str]:
    return [name for name in held if name != "step"]


def halve(optimizer):
    for held in optimizer.state.values():
        for name in names(held):
            held[name] = held[name] / 2


def halve_of_the_single_element(optimizer):
    held = optimizer.state[owners(optimizer)[1]]
    for name in names(held):
        held[name] = held[name] / 2


def equal_copies(optimizer):
    """As by way of the CPU: the values are the same, the tensors are not."""
    for held in optimizer.state.values():
        for name, value in held.items():
            held[name] = value.clone()


def other_dicts(optimizer):
    for parameter, held in list(optimizer.state.items()):
        optimizer.state[parameter] = {name: value.clone() for name, value in held.items()}


def another_state(optimizer):
    optimizer.state = defaultdict(dict, {p: copy.deepcopy(held) for p, held in optimizer.state.items()})


def other_data(optimizer):
    for held in optimizer.state.values():
        for value in held.values():
            value.data = value.data.clone()


def other_data_of_one(optimizer):
    """Not of the parameters that are looked at first. The old memory stays, where a kernel might write without harm."""
    parameter = owners(optimizer)[2]
    for value in optimizer.state[parameter].values():
        optimizer.replaced = [*getattr(optimizer, "replaced", ()), value.data]
        value.data = value.data / 2


def other_steps(optimizer):
    for held in optimizer.state.values():
        if "step" in held:
            held["step"] = torch.tensor(40.0)


def other_parameter_data(optimizer):
    for parameter in owners(optimizer):
        parameter.data = parameter.data * 2


def another_parameter(optimizer):
    """In the same place of its group, with the state of the old one."""
    old = owners(optimizer)[1]
    new = optimizer.param_groups[0]["params"][1] = torch.nn.Parameter(old.detach() + 1)
    optimizer.state[new] = optimizer.state.pop(old)


def another_order(optimizer):
    optimizer.param_groups[0]["params"].reverse()


def fewer_parameters(optimizer):
    optimizer.state.pop(optimizer.param_groups[0]["params"].pop(0))


def shorter_parameters(optimizer):
    """Where they lie."""
    for parameter in owners(optimizer):
        parameter.grad = None
        parameter.data = parameter.data[:1]
        held = optimizer.state[parameter]
        for name in names(held):
            held[name] = held[name][:1].clone()


CHANGES = [
    *(halve, halve_of_the_single_element, equal_copies, other_dicts, another_state, other_data, other_data_of_one),
    *(other_steps, other_parameter_data, another_parameter, another_order, fewer_parameters, shorter_parameters),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", KINDS)
def test_what_the_user_changes_holds(name, change):
    theirs, ours = both(name)
    for optimizer in (theirs, ours):
        change(optimizer)
        step(optimizer, 3), step(optimizer, 4)
    assert_equal(theirs, ours)


def empty(optimizer):
    optimizer.state = defaultdict(dict)


def clear(optimizer):
    optimizer.state.clear()


def clear_each(optimizer):
    for held in optimizer.state.values():
        held.clear()


@pytest.mark.parametrize("change", [empty, clear, clear_each], ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", {**KINDS, **OWN})
def test_emptied_state_begins_anew(name, change):
    options = {**KINDS, **OWN}[name]
    optimizer = getattr(optim, name)(parameters(), **options)
    step(optimizer, 1), step(optimizer, 2)
    change(optimizer)
    fresh = [torch.nn.Parameter(parameter.detach().clone()) for parameter in owners(optimizer)]
    begun = getattr(optim, name)(fresh, **options)
    for each in (optimizer, begun):
        step(each, 3), step(each, 4)
    assert all(map(torch.equal, owners(optimizer), fresh))
    for held, other in zip(optimizer.state.values(), begun.state.values(), strict=True):
        assert all(torch.equal(held[key], other[key]) for key in other)


def test_state_of_one_parameter_that_is_taken_away():
    theirs, ours = both("Adam")
    for optimizer in (theirs, ours):
        del optimizer.state[owners(optimizer)[2]]
        step(optimizer, 3)
    assert [float(held["step"]) for held in ours.state_dict()["state"].values()] == [3, 3, 1]
    assert_equal(theirs, ours)


def test_a_buffer_that_the_user_gives_is_saved_and_used():
    optimizer = optim.SGD(parameters(), **KINDS["SGD"])
    for parameter in owners(optimizer):
        optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    before = [parameter.detach().clone() for parameter in owners(optimizer)]
    assert all(held["momentum_buffer"].all() for held in optimizer.state_dict()["state"].values())
    step(optimizer, 1)
    for parameter, old in zip(owners(optimizer), before, strict=True):
        torch.testing.assert_close(parameter, old - 0.1 * (0.9 + parameter.grad))


@pytest.mark.parametrize("name", ["exp_avg", "step"])
def test_a_moment_that_is_taken_away_is_missed(name):
    theirs, ours = both("Adam")
    for optimizer in (theirs, ours):
        before = [parameter.detach().clone() for parameter in owners(optimizer)]
        del optimizer.state[owners(optimizer)[0]][name]
        with pytest.raises(KeyError, match=name):
            step(optimizer, 3)
        if optimizer is ours:
            assert all(map(torch.equal, owners(ours), before))


def test_a_state_of_another_shape_is_refused():
    optimizer = optim.Adam(parameters())
    step(optimizer, 1)
    optimizer.state[owners(optimizer)[0]]["exp_avg"] = torch.zeros(2, 2)
    with pytest.raises(RuntimeError, match=r"exp_avg of a parameter of shape \[3, 4\] on cpu has shape \[2, 2\]"):
        step(optimizer, 2)


# ---- gaps in what is loaded ------------------------------------------------------------------------------------------


def saved(name: str) -> tuple[optim.Optimizer, dict]:
    optimizer = getattr(optim, name)(parameters(), **{**KINDS, **OWN}[name])
    step(optimizer, 1), step(optimizer, 2)
    return optimizer, copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        *(("Adam", "exp_avg"), ("Adam", "max_exp_avg_sq"), ("Adam", "step"), ("AdamW", "exp_avg_sq")),
        *(("RMSprop", "grad_avg"), ("RMSprop", "momentum_buffer"), ("Adagrad", "sum"), ("SGD", "momentum_buffer")),
        *(("Lion", "exp_avg"), ("LARS", "momentum_buffer"), ("LAMB", "exp_avg_sq"), ("LAMB", "step")),
    ],
)
@pytest.mark.parametrize("how", ["renamed", "None"])
def test_a_gap_is_refused_and_named(name, missing, how):
    optimizer, state = saved(name)
    if how == "None" and missing in ("momentum_buffer", "exp_avg") and name in ("SGD", "LARS", "Lion"):
        pytest.skip("so a buffer is saved that nothing is in yet")
    held = state["state"][2]
    held["state1"] = held.pop(missing)
    if how == "None":
        held[missing] = None
    with pytest.raises(ValueError, match=f"loaded state dict lacks {missing} for parameter 2; it has .*state1"):
        optimizer.load_state_dict(state)
    twin, _ = saved(name)
    for each in (optimizer, twin):
        step(each, 3)
    assert all(map(torch.equal, owners(optimizer), owners(twin)))


@pytest.mark.parametrize(
    ("source", "target"), [("SGD", "Adam"), ("Adam", "RMSprop"), ("Adagrad", "LAMB"), ("Adam", "SGD")]
)
def test_the_state_of_another_optimizer_is_refused(source, target):
    _, state = saved(source)
    optimizer, _ = saved(target)
    with pytest.raises(ValueError, match="loaded state dict lacks"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "missing"),
    [("Adam", "lr"), ("AdamW", "betas"), ("SGD", "momentum"), ("RMSprop", "alpha"), ("Adagrad", "eps"), ("LAMB", "lr")],
)
def test_a_number_that_a_group_lacks_is_named(name, missing):
    optimizer, state = saved(name)
    del state["param_groups"][0][missing]
    with pytest.raises(ValueError, match=f"loaded state dict lacks {missing} in group 0; it has .*weight_decay"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("name", KINDS)
def test_switches_that_older_versions_did_not_have_are_off(name):
    theirs, ours = both(name)
    state = copy.deepcopy(theirs.state_dict())
    for switch in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
        state["param_groups"][0].pop(switch, None)
    for optimizer in (theirs, ours):
        optimizer.load_state_dict(copy.deepcopy(state))
        step(optimizer, 3)
    assert_equal(theirs, ours)


def test_notes_of_the_user_in_a_state_are_loaded():
    optimizer, state = saved("Adam")
    state["state"][0]["row_averages"] = torch.ones(3)
    optimizer.load_state_dict(state)
    step(optimizer, 3)
    assert torch.equal(optimizer.state_dict()["state"][0]["row_averages"], torch.ones(3))


@pytest.mark.parametrize("name", ["Adam", "LAMB"])
def test_a_step_of_the_group_is_taken(name):
    optimizer, state = saved(name)
    spoiled = copy.deepcopy(state)
    for held in spoiled["state"].values():
        del held["step"]
    spoiled["param_groups"][0]["step"] = 2
    other, _ = saved(name)
    other.load_state_dict(spoiled)
    for each in (optimizer, other):
        step(each, 3)
    assert all(map(torch.equal, owners(optimizer), owners(other)))
    assert all(held["step"] == 3 for held in other.state_dict()["state"].values())


# ---- what a state begins with, and what is refused -------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"initial_accumulator_value": 2.0}], ids=["default", "of the group"])
def test_adagrad_begins_with_the_value_asked_for_in_a_group_added_later(more):
    made = []
    for which in (torch.optim, optim):
        optimizer = which.Adagrad(parameters(), lr=0.1, initial_accumulator_value=0.5)
        step(optimizer, 1)
        late = torch.nn.Parameter(torch.ones(3))
        if which is optim:
            optimizer.add_param_group({"params": [late], **more})
        else:  # whose class has no state for it
            optimizer.add_param_group({"params": [late], **more})
            begin = torch.full_like(late, more.get("initial_accumulator_value", 0.5))
            optimizer.state[late] = {"step": torch.tensor(0.0), "sum": begin}
        step(optimizer, 2)
        made.append(optimizer)
    assert_equal(*made)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
def test_sparse_gradients_are_refused_in_torchs_words(name):
    told = []
    for which in (torch.optim, optim):
        parameter = torch.nn.Parameter(torch.ones(3, 2))
        parameter.grad = torch.ones(3, 2).to_sparse()
        with pytest.raises(RuntimeError) as refused:
            getattr(which, name)([parameter], lr=0.1).step()
        told.append(str(refused.value))
    assert told[0] == told[1]


# ---- parameters without values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"max_grad_norm": 1.0}], ids=["alone", "clipped"])
@pytest.mark.parametrize("how", ["meta", "fake"])
@pytest.mark.parametrize("name", {**KINDS, **OWN})
def test_states_of_parameters_without_values_are_made(name, how, more):
    """As to estimate the memory that a training takes: nothing is computed."""
    with FakeTensorMode() if how == "fake" else torch.device("meta"):
        given = [torch.nn.Parameter(torch.empty(shape, dtype=torch.bfloat16)) for shape in ((3, 4), (1,))]
        optimizer = getattr(optim, name)(given, **{**KINDS, **OWN}[name], **more, state_dtype=torch.float32)
        for _ in range(2):
            for parameter in given:
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()
        saved = optimizer.state_dict()["state"]
    expected = getattr(optim, name)(parameters(), **{**KINDS, **OWN}[name])
    step(expected, 1)
    for number, held in saved.items():
        assert held.keys() == expected.state_dict()["state"][number].keys()
        for key in names(held):
            assert (held[key].shape, held[key].dtype) == (given[number].shape, torch.float32)
            assert type(held[key]) is type(given[number].detach())
