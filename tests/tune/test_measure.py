"""Which plan wins: the fastest by more than noise, and never a wrong one."""

from __future__ import annotations

import math

import pytest
import torch

from gpukern.conv import launch
from gpukern.conv.plan import ConvPlan
from gpukern.conv.planner import Ranked
from gpukern.conv.prepare import prepare_launch
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.roofline import Cost
from gpukern.tune import measurement
from tests.tune.tools import LAYERS, Clock, call_of, entries, plans_of, quietly

# ---- choosing --------------------------------------------------------------------------------------------------------


def test_the_fastest_plan_is_what_calls_get_from_then_on(folder, device):
    call = call_of()
    heuristic, *_, other = plans_of(call, device)
    assert prepare_launch(*call[:-1], device_spec(device)).plan == heuristic
    report = quietly([call], device, Clock({other: 4.0}))
    assert prepare_launch(*call[:-1], device_spec(device)).plan == other
    (result,) = report.results
    assert (result.entry.plan, result.entry.heuristic) == (other, heuristic)
    assert (result.entry.microseconds, result.entry.heuristic_microseconds) == (4.0, 10.0)
    assert result.speedup == report.speedup == 2.5
    (entry,) = entries(folder, device).values()
    assert (
        entry == result.entry and entry.batch == 2 and set(entry.versions) == {"gpukern", "torch", "triton", "driver"}
    )


@pytest.mark.parametrize("microseconds, wins", [(9.9, False), (9.81, False), (9.79, True)])
def test_two_percent_are_noise(device, few, microseconds, wins):
    call = call_of()
    heuristic, other, *_ = plans_of(call, device)
    outcome = measurement.measure(call, device, Clock({other: microseconds}))
    assert outcome.plan == (other if wins else heuristic)
    assert outcome.seconds == pytest.approx(1e-6 * (microseconds if wins else 10.0))


def test_a_lucky_sample_does_not_win(device, few):
    """The best go on and are timed again; also the planner's choice, if it is not among them."""
    call = call_of()
    heuristic, lucky, *_ = plans_of(call, device)
    clock = Clock({lucky: 1.0})

    def timer(candidate):
        seconds = clock(candidate)
        clock.microseconds[lucky] = 11.0
        return seconds

    outcome = measurement.measure(call, device, timer)
    assert outcome.plan == heuristic and outcome.heuristic_seconds == pytest.approx(10e-6)
    assert clock.timed.count(lucky) == clock.timed.count(heuristic) == 1 + measurement.ROUNDS


def test_finalists_take_turns(device, monkeypatch):
    monkeypatch.setattr(measurement, "FINALISTS", 2)
    call = call_of()
    heuristic, *others = plans_of(call, device)
    fast, faster = others[:2]
    clock = Clock({fast: 3.0, faster: 2.0})
    assert measurement.measure(call, device, clock).plan == faster
    assert clock.timed[-3 * measurement.ROUNDS :] == [faster, fast, heuristic] * measurement.ROUNDS


def test_hopeless_plans_are_not_tried():
    def ranked(stages: int, bound: float) -> Ranked:
        cost = Cost(1, 1.0, 1.0, 0.0, 1, 0.0, bound)
        return Ranked(ConvPlan("taps", 64, 64, 32, 4, stages), cost, 0.0)

    all_of_them = [ranked(1, 2.0), ranked(2, 1.0), ranked(3, 3.0), ranked(4, 3.1), ranked(5, 9.0)]
    chosen = measurement.worth_trying(all_of_them, all_of_them[4].plan)
    assert [plan.num_stages for plan in chosen] == [1, 2, 3, 5]


# ---- wrong kernels ---------------------------------------------------------------------------------------------------


def one_wrong(output: torch.Tensor) -> None:
    output[0, 3, 2, 1] += 1.0


def one_missing(output: torch.Tensor) -> None:
    output[-1, -1, -1, -1] = math.nan


@pytest.mark.parametrize("fault", [one_wrong, one_missing])
def test_a_wrong_plan_never_wins_and_says_what_is_wrong(folder, device, few, breaks, fault):
    call = call_of()
    heuristic, wrong, *_ = plans_of(call, device)
    breaks(wrong, fault)
    report = quietly([call], device, Clock({wrong: 1.0}))
    (entry,) = entries(folder, device).values()
    assert entry.plan == heuristic
    ((plan, reason),) = entry.rejected
    assert plan == wrong and reason.startswith("WrongResult: 1 of 512 elements, at (")
    assert report.rejected == {reason: 1} and "rejected 1 plan: WrongResult" in str(report)


def test_a_wrong_choice_of_the_planner_is_replaced(device, few, breaks):
    call = call_of()
    heuristic, other, *_ = plans_of(call, device)
    breaks(heuristic, one_wrong)
    report = quietly([call], device, Clock({other: 9.0}))
    entry = report.results[0].entry
    assert (entry.plan, entry.heuristic_microseconds, report.results[0].speedup) == (other, None, None)
    assert "the planner's choice is not right" in str(report.results[0])
    assert prepare_launch(*call[:-1], device_spec(device)).plan == other


def test_unwritten_memory_is_seen_also_where_the_plan_before_wrote_it(device, few, monkeypatch):
    """A kernel that writes nothing must not be shown right by what its neighbour left in the memory."""
    call = call_of()
    heuristic, lazy, *_ = plans_of(call, device)
    write = launch.write
    monkeypatch.setattr(
        launch, "write", lambda prepared, *arguments: None if prepared.plan == lazy else write(prepared, *arguments)
    )
    outcome = measurement.measure(call, device, Clock({lazy: 1.0}))
    assert outcome.plan == heuristic and "nan" in outcome.rejected[lazy]


def test_what_fails_is_rejected_and_the_rest_goes_on(device, few, breaks):
    call = call_of()
    heuristic, failing, *_ = plans_of(call, device)

    def fails(output):
        raise RuntimeError("out of resource: shared memory\nRequired: 300000\n")

    breaks(failing, fails)
    outcome = measurement.measure(call, device, Clock())
    assert outcome.plan == heuristic
    assert outcome.rejected == {failing: "RuntimeError: out of resource: shared memory"}


def test_where_every_plan_is_wrong_none_is_kept(folder, device, few, monkeypatch):
    call = call_of()

    def fails(*arguments):
        raise RuntimeError("no")

    monkeypatch.setattr(launch, "run", fails)
    clock = Clock()
    report = quietly([call], device, clock)
    (entry,) = entries(folder, device).values()
    assert (entry.plan, entry.microseconds, len(entry.rejected), clock.timed) == (None, None, 3, [])
    assert report.speedup is None and "no plan is right, 3 rejected" in str(report.results[0])
    assert "none is right" in str(report)
    assert prepare_launch(*call[:-1], device_spec(device)).plan == entry.heuristic


def test_a_problem_that_cannot_be_measured_is_no_end(folder, device, few, monkeypatch):
    plain = measurement.Check

    def no_memory_for_two_images(call, device):
        if call.problem.N == 2:
            raise RuntimeError("out of memory")
        return plain(call, device)

    monkeypatch.setattr(measurement, "Check", no_memory_for_two_images)
    report = quietly([call_of(LAYERS[1]), call_of(LAYERS[0])], device, Clock())
    assert len(report.results) == len(entries(folder, device)) == 1
    assert report.failed == [(str(call_of(LAYERS[1])), "RuntimeError: out of memory")]
    assert "not measured: " in str(report)
