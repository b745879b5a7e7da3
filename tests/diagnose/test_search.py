from __future__ import annotations

import json
import math
import re

import pytest

from gpukern.diagnose import DiagnoseError, MissingPackage, choice, integers, log_uniform, search, uniform
from gpukern.diagnose.search_report import SearchReport
from gpukern.diagnose.search_values import Run
from gpukern.diagnose.space import Range

optuna = pytest.importorskip("optuna")
SPACE = {"lr": log_uniform(1e-5, 1e-1), "width": integers(2, 64, log=True), "kind": choice("a", "b")}


def valley(settings, report=None):
    """Least at lr 1e-3 and width 12."""
    return math.log10(settings["lr"] / 1e-3) ** 2 + math.log(settings["width"] / 12) ** 2


def test_draws_stay_in_their_ranges_and_are_uniform_in_the_logarithm():
    report = search(valley, SPACE, trials=200, rounds=1)
    rates = sorted(math.log10(run.settings["lr"]) for run in report.runs)
    assert rates[0] >= -5 and rates[-1] <= -1
    for share in (0.25, 0.5, 0.75):
        assert rates[int(200 * share)] == pytest.approx(-5 + 4 * share, abs=0.4)
    assert {run.settings["kind"] for run in report.runs} == {"a", "b"}
    assert all(isinstance(run.settings["width"], int) and 2 <= run.settings["width"] <= 64 for run in report.runs)


def test_second_round_searches_a_third_of_each_range_around_the_best():
    report = search(valley, SPACE, trials=31, rounds=2)
    assert [sum(run.round == number for run in report.runs) for number in (1, 2)] == [16, 15]
    first = min((run for run in report.runs if run.round == 1), key=lambda run: run.value)
    fine = report.rounds[1]["lr"]
    assert fine.low <= first.settings["lr"] <= fine.high
    assert math.log(fine.high / fine.low) == pytest.approx(math.log(1e4) / 3)
    assert all(fine.low <= run.settings["lr"] <= fine.high for run in report.runs if run.round == 2)
    assert report.best.value <= first.value and report.best == report.ranked[0]
    assert report.rounds[1]["kind"] == SPACE["kind"]


def test_largest_value_is_the_best_if_asked():
    report = search(lambda settings, report: -valley(settings), SPACE, trials=20, rounds=2, maximize=True)
    assert report.best.value == max(run.value for run in report.runs)


@pytest.mark.parametrize(
    ("best", "said"), [(2e-5, "lower border.*below 1.0e-05"), (0.08, "upper border.*above 0.1"), (1e-3, "")]
)
def test_best_on_the_border_is_warned_of(best, said):
    run = Run(1, 0, {"lr": best, "width": 9, "kind": "a"}, 1.0, "complete")
    warnings = " ".join(SearchReport((run,), SPACE, (SPACE,)).warnings)
    assert bool(warnings) == bool(said) and re.search(said, warnings)


def test_border_of_the_narrow_round_inside_of_the_first_range_is_none():
    run = Run(2, 0, {"lr": 1e-3}, 1.0, "complete")
    space = {"lr": log_uniform(1e-5, 1e-1)}
    assert not SearchReport((run,), space, (space, {"lr": log_uniform(1e-3, 1e-2)})).warnings


def test_bad_runs_are_ended_by_successive_halving():
    steps = []

    def train(settings, report):
        for epoch in range(1, 10):
            steps.append(epoch)
            report(valley(settings) + 1 / epoch)
        return valley(settings)

    report = search(train, SPACE, trials=27, rounds=1, halving=3)
    lengths = [len(run.curve) for run in report.runs]
    assert set(lengths) <= {1, 3, 9}, "runs end at 1, 3 and 9 epochs"
    assert lengths.count(1) >= 12 and len(steps) < 0.6 * 27 * 9
    assert all((run.state == "complete") == (len(run.curve) == 9) for run in report.runs)
    assert report.best.value == min(run.value for run in report.runs if run.state == "complete")
    assert len(search(train, SPACE, trials=5, rounds=1, halving=0).ranked) == 5


def test_runs_that_become_nan_failed_and_the_search_goes_on():
    def train(settings, report):
        if settings["kind"] == "a":
            report(math.nan)
        return valley(settings) if settings["width"] > 5 else math.inf

    report = search(train, SPACE, trials=20, rounds=1)
    assert len(report.runs) == 20
    for run in report.runs:
        assert run.state == ("complete" if run.settings["kind"] == "b" and run.settings["width"] > 5 else "failed")
    with pytest.raises(DiagnoseError, match="no run of the first round was completed"):
        search(lambda settings, report: math.nan, SPACE, trials=4, rounds=2)


def test_interrupted_search_goes_on_and_draws_the_same(tmp_path):
    whole = search(valley, SPACE, trials=12, rounds=2)

    def interrupted(settings, report):
        done.append(settings)
        if len(done) in (4, 9):
            raise KeyboardInterrupt
        return valley(settings)

    done: list = []
    storage = tmp_path / "new" / "search.db"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            search(interrupted, SPACE, trials=12, rounds=2, storage=storage)
    report = search(interrupted, SPACE, trials=12, rounds=2, storage=storage)
    assert [(run.round, run.settings, run.value) for run in report.runs] == [
        (run.round, run.settings, run.value) for run in whole.runs
    ]
    assert len(done) == 14, "only the interrupted ones ran twice"
    assert search(valley, SPACE, trials=12, rounds=2, storage=storage) == report and len(done) == 14


def test_killed_run_begins_again(tmp_path):
    """A process that is killed leaves its trial running."""
    storage = tmp_path / "search.db"
    search(valley, SPACE, trials=2, rounds=1, storage=storage)
    study = optuna.load_study(study_name="search, round 1", storage=f"sqlite:///{storage}")
    trial = study.ask()
    settings = {
        "lr": trial.suggest_float("lr", 1e-5, 1e-1, log=True),
        "width": trial.suggest_int("width", 2, 64, log=True),
    }
    settings["kind"] = trial.suggest_categorical("kind", ["a", "b"])
    report = search(valley, SPACE, trials=3, rounds=1, storage=storage)
    assert len(report.runs) == 3 and report.runs[-1].settings == settings


def test_storage_of_another_space_is_refused(tmp_path):
    search(valley, SPACE, trials=1, rounds=1, storage=tmp_path / "search.db")
    with pytest.raises(ValueError, match=r"another space.*another name="):
        search(valley, {**SPACE, "lr": log_uniform(1e-6, 1)}, trials=2, rounds=1, storage=tmp_path / "search.db")


def test_errors_of_the_training_come_through():
    with pytest.raises(ZeroDivisionError):
        search(lambda settings, report: 1 / 0, SPACE, trials=2, rounds=1)


def test_training_that_returns_nothing_is_told():
    with pytest.raises(TypeError, match="train must return the value to minimize or maximize, got None"):
        search(lambda settings, report: None, SPACE, trials=2, rounds=1)


def test_report_has_a_table_json_and_a_picture(tmp_path):
    def train(settings, report):
        report(valley(settings))
        report(valley(settings))
        return valley(settings) * 100

    space = {**SPACE, "dropout": uniform(0, 0.5), "units": integers(1, 3), "decay": log_uniform(1e-6, 1)}
    report = search(train, space, trials=12)
    assert "12 runs" in str(report) and "dropout" in str(report)
    assert len(json.loads(report.to_json())["runs"]) == 12
    report.plot(tmp_path / "search.png")
    SearchReport((), SPACE, (SPACE,)).plot(tmp_path / "empty.png")
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: log_uniform(0, 1), "begins above 0"),
        (lambda: uniform(1, 1), "smaller to a larger"),
        (lambda: uniform(0, math.inf), "smaller to a larger"),
        (lambda: integers(1.5, 3), "whole"),
        (lambda: choice(), "a choice is of numbers"),
        (lambda: choice([1]), "a choice is of numbers"),
        (lambda: search(valley, {}), "space must be a dict"),
        (lambda: search(valley, {"lr": (0, 1)}), "space must be a dict"),
        (lambda: search(valley, SPACE, trials=1, rounds=2), "trials of at least as many"),
    ],
)
def test_what_makes_no_sense_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_narrowed_ranges_stay_inside():
    whole = Range(0, 9)
    ends = [(each.low, each.high) for each in (whole.narrowed(value, 1 / 3) for value in (0, 4.5, 9))]
    assert [end for pair in ends for end in pair] == pytest.approx([0, 3, 3, 6, 6, 9])
    assert Range(1, 64, log=True, integer=True).narrowed(64, 1 / 3) == Range(16, 64, log=True, integer=True)
    assert Range(2, 3, integer=True).narrowed(2, 1 / 3) == Range(2, 3, integer=True)


def test_missing_optuna_is_told_with_what_installs_it(monkeypatch):
    def without(name):
        raise ModuleNotFoundError(name, name="optuna")

    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(MissingPackage, match=r"pip install 'gpukern\[train\]'"):
        search(valley, SPACE)
