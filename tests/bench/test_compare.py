"""What got slower between two runs: beyond the noise, and not because the machine did."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from bench import compare as module
from bench.compare import compare
from bench.results import ResultsError
from tests.bench import made_up
from tests.bench.made_up import results, row


def steady(value: float, noise: float = 0.0) -> dict[str, list[float]]:
    return {"graph": [value * (1 + noise * (i % 5 - 2) / 2) for i in range(15)]}


def pair(old, new, peers_old=None, peers_new=None):
    return compare(results([row(old, peers_old)]), results([row(new, peers_new)]))


def printed(comparison, width: int = 110) -> str:
    out = io.StringIO()
    module.show(comparison, Console(file=out, width=width, color_system=None))
    return out.getvalue()


@pytest.mark.parametrize(
    "old, new, verdict",
    [
        (steady(100), steady(103), "slower"),
        (steady(100), steady(97), "faster"),
        (steady(100), steady(101.5), "same"),
        (steady(100), steady(98.5), "same"),
        (steady(100, 0.1), steady(105, 0.1), "same"),
        (steady(100, 0.01), steady(105, 0.01), "slower"),
    ],
    ids=["3 % more", "3 % less", "1.5 % more", "1.5 % less", "5 % more within 10 % noise", "5 % more beyond 1 % noise"],
)
def test_a_verdict_needs_a_change_beyond_noise_and_threshold(old, new, verdict):
    comparison = pair(old, new)
    assert comparison.changes[0].verdict == verdict
    assert comparison.worse == (verdict == "slower")


@pytest.mark.parametrize("ours, verdict", [(110, "same"), (100, "faster"), (121, "slower")])
def test_the_drift_of_the_peers_is_the_machines(ours, verdict):
    old_peers, new_peers = ({name: steady(t) for name in "abc"} for t in (50, 55))
    new_peers["c"] = steady(500)
    comparison = pair(steady(100), steady(ours), old_peers, new_peers)
    assert (comparison.drift, comparison.drift_samples) == (pytest.approx(1.1), 3)
    assert comparison.changes[0].verdict == verdict
    assert comparison.changes[0].ratio == pytest.approx(ours / 110)


def test_only_the_same_ok_peers_tell_the_drift():
    old = results([row(steady(100), {"a": steady(50), "b": steady(50), "c": "failed", "gone": steady(1)})])
    new = results([row(steady(100), {"a": steady(50), "b": "wrong", "c": steady(70), "new": steady(2)})])
    assert compare(old, new).drift_samples == 1
    (changed,) = new.rows
    peer = changed.candidates[1]
    other = type(peer)(**{**vars(peer), "setting": "another way"})
    renamed = type(changed)(**{**vars(changed), "candidates": (changed.candidates[0], other)})
    comparison = compare(old, results([renamed]))
    assert (comparison.drift, comparison.drift_samples) == (1.0, 0)
    assert "unknown" in printed(comparison)


def test_times_of_one_kind_are_compared():
    both = {"graph": [10.0] * 8, "eager": [30.0] * 8}
    assert pair(both, {"eager": [60.0] * 8}).changes[0].ratio == 2.0
    (unclear,) = pair({"graph": [10.0] * 8}, {"wall": [10.0] * 8}).unclear
    assert unclear.reason == "timed otherwise" and not unclear.broken


@pytest.mark.parametrize("status", ["wrong", "failed", "missing"])
def test_what_was_ok_and_is_not_any_more_is_broken(status):
    comparison = pair(10.0, status)
    assert [row.new for row in comparison.broken] == [status] and comparison.worse and not comparison.changes
    assert "broken" in printed(comparison) and "0 slower, 0 faster, 0 same, 1 broken" in printed(comparison)


@pytest.mark.parametrize("old, new", [("failed", 10.0), ("failed", "wrong")])
def test_what_was_not_ok_before_is_not_broken_now(old, new):
    comparison = pair(old, new)
    assert len(comparison.unclear) == 1 and not comparison.broken and not comparison.worse


def test_rows_of_one_run_only_are_named():
    old = results([row(10.0, problem="a"), row(10.0, problem="b")])
    new = results([row(10.0, problem="b"), row(10.0, problem="c")])
    comparison = compare(old, new)
    assert [case.problem for case in comparison.only_old] == ["a"]
    assert [case.problem for case in comparison.only_new] == ["c"]
    assert len(comparison.changes) == 1 and not comparison.worse
    text = printed(comparison)
    assert "only in the old run" in text and "only in the new run" in text


def test_the_slowest_first():
    times = {"a": 103, "b": 150, "c": 90, "d": 100}
    old = results([row(steady(100), problem=name) for name in times])
    new = results([row(steady(t), problem=name) for name, t in times.items()])
    comparison = compare(old, new)
    assert [change.case.problem for change in comparison.changes] == ["b", "a", "d", "c"]
    text = printed(comparison)
    assert text.index("+50.0%") < text.index("+3.0%") < text.index("-10.0%")
    assert "2 slower, 1 faster, 1 same, 0 broken" in text


def test_other_devices_are_refused_other_versions_shown():
    old = made_up.run(commit=made_up.OLD)
    with pytest.raises(ResultsError, match="Made-up GPU and Another GPU"):
        compare(old, made_up.run(device="Another GPU"))
    text = printed(compare(old, made_up.run(driver="9", flags={"cudnn.benchmark": False})))
    assert "0.4 → 9" in text and "cudnn.benchmark=False" in text
    assert "1111111aa" in text and "2222222bb" in text


def test_two_whole_runs():
    same = compare(made_up.run(), made_up.run())
    assert not same.worse and {change.verdict for change in same.changes} == {"same"} and len(same.changes) == 35
    slower = compare(made_up.run(), made_up.run(speed=0.9))
    assert slower.worse and {change.verdict for change in slower.changes} == {"slower"}
    assert slower.drift == 1.0
    assert max(cell_len(line) for line in printed(slower, 100).splitlines()) <= 100
