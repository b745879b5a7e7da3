"""The suite of plans: each a right one, each another one, and first the plan that a call gets."""

from __future__ import annotations

import pytest
import torch

from bench.accuracy import relative_error
from bench.predict import describe_plan
from bench.results import Case
from bench.suite import Task, suites
from bench.suites import plans
from gpukern.ops._conv2d.plan import Direction, Variant, plan
from gpukern.ops._conv2d.problem import conv_problem
from gpukern.runtime.current_device import device_spec, pretend
from gpukern.runtime.device import H100
from gpukern.runtime.mode import EMULATE

TAPS = conv_problem((1, 32, 3, 5), (16, 32, 1, 2), None, (1, 1), (0, 0, 1, 1), (1, 1), 1)
FLAT = conv_problem((2, 3, 6, 5), (8, 3, 3, 3), None, (2, 2), (1, 1, 1, 1), (1, 1), 1)
DIRECT = conv_problem((2, 12, 5, 6), (12, 1, 3, 3), None, (1, 1), (1, 1, 1, 1), (1, 1), 12)
PROBLEMS = {"taps": TAPS, "flat": FLAT, "direct": DIRECT}
PLANS = suites()["plans"]

needs_kernels = pytest.mark.skipif(
    not (EMULATE or torch.cuda.is_available()), reason="plans are plans of kernels, which run here neither way"
)


def make(problem, computation: str, dtype: str = "float32") -> Task:
    return Task(Case("plans", computation, *PLANS.describe(problem), 1, dtype, "channels_last", ()), problem)


@needs_kernels
@pytest.mark.parametrize("computation", [direction.value for direction in Direction])
@pytest.mark.parametrize("variant", PROBLEMS)
def test_every_plan_gives_a_right_result(variant, computation, device, poisoned):
    task = make(PROBLEMS[variant], computation)
    tensors = PLANS.tensors(task, device)
    reference = PLANS.reference(task, tensors)
    found = PLANS.implementations(task, (), device)
    assert len(found) >= 5
    right = 0
    for each in found:
        assert not each.missing
        try:
            output = each.function(*each.prepare(tensors))
        except Exception:
            # Too large a tile for the GPU at hand is shown as failed; an interpreter takes all.
            assert device.type == "cuda", each.name
            continue
        right += 1
        assert relative_error(output, reference) <= PLANS.bound(task), each.name
    assert right >= 2


@pytest.mark.parametrize("dtype, precision", [("float16", "ieee"), ("tf32", "tf32"), ("float32", "ieee")])
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("variant", PROBLEMS)
def test_the_first_is_the_plan_of_a_call_and_all_differ(variant, direction, dtype, precision):
    problem, meta = PROBLEMS[variant], torch.device("meta")
    with pretend(H100):
        found = [each.name for each in PLANS.implementations(make(problem, direction.value, dtype), (), meta)]
        name = "float16" if dtype == "float16" else "float32"
        chosen = plan(problem, direction, name, precision, device_spec(meta))
    assert chosen.variant in (Variant(variant), *([Variant.TAPS] if direction is Direction.INPUT_GRAD else []))
    assert found[0] == f"gpukern {describe_plan(chosen)}"
    assert len(set(found)) == len(found) >= 5


def test_without_kernels_each_plan_is_missing(monkeypatch):
    monkeypatch.setattr(plans, "EMULATE", False)
    for place, missing in (("cpu", "the kernels need a CUDA device"), ("meta", "")):
        found = PLANS.implementations(make(FLAT, "forward"), (), torch.device(place))
        assert {each.missing for each in found} == {missing}
