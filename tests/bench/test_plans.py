"""The suite of plans: each a right one, each another one, and first the plan that a call gets."""

from __future__ import annotations

import pytest
import torch

from bench.accuracy import relative_error
from bench.results import Case
from bench.suite import Task, suites
from bench.suites import plans
from gpukern.conv.families.registry import family_of
from gpukern.conv.plan import Direction, Variant
from gpukern.conv.planner import ranking
from gpukern.conv.problem import conv_problem
from gpukern.explain.formatting import describe_plan
from gpukern.explain.ranking import chosen
from gpukern.runtime.current_device import pretend
from gpukern.runtime.device import A100, H100
from gpukern.runtime.mode import EMULATE

TAPS = conv_problem((1, 32, 3, 5), (16, 32, 1, 2), None, (1, 1), (0, 0, 1, 1), (1, 1), 1)
FLAT = conv_problem((2, 3, 6, 5), (8, 3, 3, 3), None, (2, 2), (1, 1, 1, 1), (1, 1), 1)
DIRECT = conv_problem((2, 12, 5, 6), (12, 1, 3, 3), None, (1, 1), (1, 1, 1, 1), (1, 1), 12)
PROBLEMS = {"taps": TAPS, "flat": FLAT, "direct": DIRECT}
PLANS = suites()["plans"]

needs_kernels = pytest.mark.skipif(
    not (EMULATE or torch.cuda.is_available()), reason="plans are plans of kernels, which run here neither way"
)


def make(problem, direction: Direction, dtype: str = "float32", layout: str = "channels_last") -> Task:
    return Task(Case("plans", direction.value, *PLANS.describe(problem), 1, dtype, layout, ()), problem)


@needs_kernels
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("variant", PROBLEMS)
def test_every_plan_gives_a_right_result(variant, direction, device, poisoned):
    task = make(PROBLEMS[variant], direction)
    tensors = PLANS.tensors(task, device)
    reference = PLANS.reference(task, tensors)
    found = PLANS.implementations(task, (), device)
    assert len(found) >= 5
    right = 0
    for each in found:
        if each.missing:
            # One that only a GPU can run.
            assert device.type == "cpu" and each.missing == "the interpreter cannot run it"
            continue
        try:
            output = each.function(*each.prepare(tensors))
        except Exception:
            # Too large a tile for the GPU at hand is shown as failed; an interpreter takes all.
            assert device.type == "cuda", each.name
            continue
        right += 1
        assert relative_error(output, reference) <= PLANS.bound(task), each.name
    assert right >= 2


@pytest.mark.parametrize("layout", ["channels_last", "NCHW"])
@pytest.mark.parametrize("dtype", ["float16", "tf32", "float32"])
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("variant", PROBLEMS)
@pytest.mark.parametrize("device", [A100, H100], ids=lambda device: device.name)
def test_the_first_is_the_plan_of_a_call_and_all_differ(variant, direction, dtype, layout, device):
    task = make(PROBLEMS[variant], direction, dtype, layout)
    with pretend(device):
        found = [each.name for each in PLANS.implementations(task, (), torch.device("meta"))]
    choice, _ = chosen(plans.question_of(task, device))
    assert found[0] == f"gpukern {describe_plan(choice, direction)}"
    assert len(set(found)) == len(found) == len(plans.plans(plans.question_of(task, device))) >= 5


def test_the_candidates_are_every_kernel_s_and_neighbours_of_the_gather_s():
    problem = conv_problem((32, 64, 56, 56), (64, 64, 3, 3), None, (1, 1), (1, 1, 1, 1), (1, 1), 1)
    for direction in Direction:
        question = plans.question_of(make(problem, direction, "float16"), H100)
        ranked = [each.plan for each in ranking(problem, direction, question.operands, H100)]
        found = plans.plans(question)
        assert set(ranked) < set(found)
        # A tile of a kernel that takes any, with other warps, and in the weight gradient other splits.
        taps = next(each for each in ranked if each.variant is Variant.TAPS)
        others = [each for each in found if each not in ranked]
        assert {each.variant for each in others} == {Variant.TAPS}
        assert {each.num_warps for each in others} == {2, 4, 8} and (256, 128) in {
            (each.block_m, each.block_n) for each in others
        }
        assert (len({each.splits for each in others}) > 1) == (direction is Direction.WEIGHT_GRAD)
        assert all(each.precision == taps.precision for each in found)
    assert all(each.variant in family_of(each).variants for each in found)


def test_without_kernels_each_plan_is_missing(monkeypatch):
    monkeypatch.setattr(plans, "EMULATE", False)
    for place, missing in (("cpu", "the kernels need a CUDA device"), ("meta", "")):
        found = PLANS.implementations(make(FLAT, Direction.FORWARD), (), torch.device(place))
        assert {each.missing for each in found} == {missing}
