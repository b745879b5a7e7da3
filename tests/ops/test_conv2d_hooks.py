"""Watching the choice of plans, and choosing in its place."""

from __future__ import annotations

import pytest
import torch

from gpukern import conv
from gpukern.conv import ConvPlan, Direction, Epilogue, Variant, conv_problem
from gpukern.runtime.device import H100
from gpukern.runtime.strides import dense_strides

P = conv_problem((2, 16, 8, 8), (32, 16, 3, 3), None, (1, 1), (1, 1, 1, 1), (1, 1), 1)
OWN = ConvPlan(Variant.TAPS, 16, 16, 16, num_warps=1, num_stages=1)


@pytest.fixture(autouse=True)
def no_measurements(monkeypatch):
    monkeypatch.setenv("GPUKERN_PLANS", "")


def prepared(direction: Direction = Direction.FORWARD, activation: str = "none", **options) -> conv.Prepared:
    epilogue = Epilogue(activation)
    first, second, _ = (dense_strides(shape, channels_last=True) for shape in conv.shapes(P, direction))
    return conv.prepare_launch(
        P, direction, first, second, None, True, torch.float16, "ieee", H100, epilogue, **options
    )


def test_each_choice_is_reported_also_of_what_was_prepared_before():
    before = prepared()
    seen = []
    with conv.observe(lambda call, device: seen.append((call, device))):
        assert prepared().plan == prepared().plan == before.plan
        prepared(Direction.WEIGHT_GRAD)
        prepared(plan=OWN)  # the caller's own: no choice
    prepared(Direction.INPUT_GRAD)
    assert [call.direction for call, _ in seen] == [Direction.FORWARD, Direction.WEIGHT_GRAD]
    call, device = seen[0]
    assert (call.problem, call.dtype, device) == (P, torch.float16, H100)
    assert conv.choose(P, call.direction, call.operands, device).plan == before.plan
    assert call.output == before.strides


def test_a_pooled_choice_is_reported_too():
    first, second, _ = (dense_strides(shape, channels_last=True) for shape in conv.shapes(P, Direction.FORWARD))
    seen = []
    with conv.observe(lambda call, device: seen.append(call.problem)):
        conv.pooled_choice(P, first, second, True, torch.float16, "ieee", H100)
    assert seen == [conv.pooled_problem(P)]


def test_a_forced_plan_is_launched_whatever_would_be_chosen_and_only_meanwhile():
    usual = prepared().plan
    assert usual != OWN
    with conv.force_plan(OWN):
        assert prepared().plan == OWN
        other = ConvPlan(Variant.TAPS, 32, 16, 16, num_warps=1, num_stages=1)
        with conv.force_plan(other):
            assert prepared().plan == other
        assert prepared().plan == OWN
        assert conv.choose(P, Direction.FORWARD, conv.Operands("float16"), H100) == (OWN, False)
    assert prepared().plan == usual


def test_an_error_inside_leaves_nothing_behind():
    seen = []
    with pytest.raises(KeyError), conv.force_plan(OWN), conv.observe(lambda *call: seen.append(call)):
        raise KeyError
    assert prepared(activation="relu").plan != OWN and not seen
