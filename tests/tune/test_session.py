"""Nothing that was measured is lost, and nothing is measured twice."""

from __future__ import annotations

import pytest
import torch

from gpukern.conv import database, launch
from gpukern.conv.prepare import prepare_launch
from gpukern.runtime.current_device import device_spec
from gpukern.tune import TuneError, measurement, session
from gpukern.tune.record import Call
from gpukern.tune.session import distinct
from tests.tune.tools import LAYERS, Clock, call_of, entries, plans_of, quietly


def two() -> list[Call]:
    return [call_of(LAYERS[0]), call_of(LAYERS[1])]


def test_an_interrupted_run_goes_on_where_it_was(folder, device, few):
    calls = two()
    clock, timed = Clock(), 0

    def interrupted(candidate):
        nonlocal timed
        timed += 1
        if timed > 3 * (1 + measurement.ROUNDS):  # in the second problem
            raise KeyboardInterrupt
        return clock(candidate)

    with pytest.raises(KeyboardInterrupt):
        quietly(calls, device, interrupted)
    (name,) = entries(folder, device)
    assert name == next(iter(distinct(calls)))
    again = Clock({plans_of(calls[1], device)[1]: 1.0})
    report = quietly(calls, device, again)
    assert [result.before for result in report.results] == [True, False]
    assert set(again.timed) <= set(plans_of(calls[1], device)) and len(entries(folder, device)) == 2
    assert "(measured before)" in str(report)


def test_what_was_measured_is_not_measured_again(folder, device, few, monkeypatch):
    quietly(two(), device, Clock())
    quiet = Clock()
    assert [result.before for result in quietly(two(), device, quiet).results] == [True, True]
    assert not quiet.timed
    for change in ("again", "versions", "batch"):
        clock = Clock()
        with monkeypatch.context() as patch:
            calls = two()
            if change == "versions":
                patch.setattr(session, "driver_version", lambda: "999.1")
            if change == "batch":
                calls = [call_of("3x16x4x4 16x3x3 --padding 1"), call_of("4x16x4x4 16x3x3 --padding 1")]
                quietly(calls[:1], device, Clock())
                assert len(entries(folder, device)) == 3
                calls = calls[1:]
            report = quietly(calls, device, clock, again=change == "again")
        assert clock.timed and not any(result.before for result in report.results), change
    assert len(entries(folder, device)) == 3


def test_no_problem_is_begun_without_time(folder, device, few, monkeypatch):
    clock = Clock()
    report = quietly(two(), device, clock, minutes=0)
    assert (report.left, report.results, clock.timed, entries(folder, device)) == (2, [], [], {})
    assert "no time was left for 2 of the problems" in str(report)
    # The problem that was begun is finished.
    now = 0.0
    monkeypatch.setattr(session.time, "monotonic", lambda: now)

    def slow(candidate):
        nonlocal now
        now += 61.0
        return clock(candidate)

    report = quietly(two(), device, slow, minutes=1)
    assert (report.left, len(report.results), len(entries(folder, device))) == (1, 1, 1)


def test_a_plan_that_takes_the_device_away_is_noted_and_left_out_next_time(folder, device, few, breaks, monkeypatch):
    call, other = call_of(), call_of(LAYERS[0])
    heuristic, *rest = plans_of(call, device)
    deadly = next(plan for plan in rest if plan not in plans_of(other, device))

    def illegal(output):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    breaks(deadly, illegal)
    monkeypatch.setattr(measurement, "is_lost", lambda device: True)
    with pytest.raises(TuneError, match=r"illegal memory access.* goes on without that plan"):
        quietly([call, other], device, Clock())
    (entry,) = entries(folder, device).values()
    assert entry.plan is None and [plan for plan, _ in entry.rejected] == [deadly]
    assert prepare_launch(*call[:-1], device_spec(device)).plan == heuristic
    # The next run does not run it, and is not taken in by its speed.
    clock = Clock({deadly: 1.0})
    quietly([call, other], device, clock)
    assert deadly not in clock.timed
    entry = entries(folder, device)[next(iter(distinct([call])))]
    assert entry.plan == heuristic and "illegal memory access" in dict(entry.rejected)[deadly]


def test_what_failed_in_a_finished_run_is_tried_again_when_asked(folder, device, few, breaks):
    call = call_of()
    _, failing, *_ = plans_of(call, device)

    def fails(output):
        raise RuntimeError("the driver was not in the mood")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "run", launch.run)  # put back what breaks() replaces
        breaks(failing, fails)
        quietly([call], device, Clock())
    (entry,) = entries(folder, device).values()
    assert entry.plan and [plan for plan, _ in entry.rejected] == [failing]
    quietly([call], device, Clock({failing: 1.0}), again=True)
    (entry,) = entries(folder, device).values()
    assert entry.plan == failing and not entry.rejected


def test_only_a_device_that_answers_no_more_is_lost(monkeypatch):
    gpu, answers = torch.device("cuda", 0), True

    def synchronize(device):
        if not answers:
            raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert not measurement.is_lost(torch.device("cpu")) and not measurement.is_lost(gpu)
    answers = False
    assert measurement.is_lost(gpu)


def test_a_file_that_is_not_ours_is_refused_before_anything_is_measured(folder, device):
    folder.mkdir()
    path = folder / database.file_name(device_spec(device).name)
    path.write_text('{"schema": 99, "plans": {}}')
    clock = Clock()
    with pytest.raises(TuneError, match=r"cannot be kept.*schema 99"):
        quietly(two(), device, clock)
    path.unlink()
    (folder / "file").touch()
    (folder / "nowhere").symlink_to(folder / "no such place" / "at all")
    for name in ("file", "nowhere"):
        with pytest.raises(TuneError, match="cannot be kept"):
            quietly(two(), device, clock, folder=folder / name / "below")
    assert not clock.timed


def test_of_problems_in_one_bucket_one_is_measured():
    three, four, five = (call_of(f"{batch}x16x4x4 16x3x3") for batch in (3, 4, 5))
    assert next(iter(distinct([three, five, call_of("6x16x4x4 16x3x3")]).values())) is three
    assert list(distinct([three, four, five]).values()) == [four]
    assert len(distinct([three, call_of("3x16x4x4 16x3x3", "bfloat16")])) == 2


def test_where_plans_go(folder, tmp_path, device, few, monkeypatch):
    assert session.default_folder() == folder
    for value in ("", None):
        monkeypatch.setenv("GPUKERN_PLANS", "") if value == "" else monkeypatch.delenv("GPUKERN_PLANS")
        assert session.default_folder() == tmp_path / "cache" / "gpukern" / "plans"
    report = quietly([call_of()], device, Clock(), folder=tmp_path / "elsewhere")
    assert report.path.parent == tmp_path / "elsewhere" and report.path.exists()
