"""Measured plans: read back from results, fitted to, and bundled with gpukern."""

from __future__ import annotations

import dataclasses
import json

import pytest
import typer

from bench import bundle_plans, calibrate, measured_plans, results
from bench.measured_plans import plan_called
from bench.results import Candidate, ResultsError
from gpukern.conv import database
from gpukern.conv.estimate import MEASURED
from gpukern.conv.plan import Direction, Operands
from gpukern.conv.planner import heuristic_plan, only_measured, ranking
from gpukern.conv.problem import conv_problem
from gpukern.explain.formatting import describe_plan
from gpukern.runtime.device import H100, H200
from tests.bench import made_up
from tests.ops.conv_cases import CASES, as_problem

SIZES = {
    "N": 32, "C": 128, "H": 28, "W": 28, "K": 256, "R": 3, "S": 3, "P": 28, "Q": 28,
    "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1,
}  # fmt: skip
PROBLEM = conv_problem((32, 128, 28, 28), (256, 128, 3, 3), None, (1, 1), (1, 1, 1, 1), (1, 1), 1)
OPERANDS = Operands("float16")


def file(tmp_path, seconds, device="NVIDIA H200", suite="plans", status="ok"):
    """A results file with a row of plans that took ``seconds`` each; the first is the call's own."""
    candidates = [
        Candidate(
            f"gpukern {describe_plan(choice, Direction.FORWARD)}",
            "channels_last",
            status,
            samples={"graph": [1e6 * taken, 1.1e6 * taken, 0.9e6 * taken]} if status == "ok" else {},
        )
        for choice, taken in seconds.items()
    ]
    row = dataclasses.replace(made_up.row(1.0, suite=suite, sizes=SIZES), candidates=tuple(candidates))
    path = tmp_path / "plans.json"
    results.write(path, made_up.results([row], device=device))
    return path


def offered():
    return [each for each in ranking(PROBLEM, Direction.FORWARD, OPERANDS, H200) if not only_measured(each.plan)]


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_plan_in_words_is_the_plan(case, direction):
    for dtype, precision in (("float16", "ieee"), ("float32", "tf32"), ("float32", "ieee")):
        for each in ranking(as_problem(case), direction, Operands(dtype, precision), H100):
            assert plan_called(describe_plan(each.plan, direction), direction) == each.plan


def test_other_words_are_no_plan():
    with pytest.raises(ValueError, match="describes no plan"):
        plan_called("box 128×64, 4 warps", Direction.FORWARD)


def test_rows_are_problems_again(tmp_path):
    best, second = (each.plan for each in offered()[:2])
    (row,) = measured_plans.read(file(tmp_path, {second: 2e-5, best: 1e-5}))
    assert (row.problem, row.direction, row.operands, row.device) == (PROBLEM, Direction.FORWARD, OPERANDS, H200)
    assert row.seconds == pytest.approx({second: 2e-5, best: 1e-5}) and row.best == best


@pytest.mark.parametrize(
    "options, message",
    [
        ({"suite": "conv"}, "no measured plans"),
        ({"status": "failed"}, "no measured plans"),
        ({"device": "a GPU"}, "peaks of a GPU are not known"),
    ],
)
def test_files_that_tell_nothing_are_refused(tmp_path, options, message):
    with pytest.raises(ResultsError, match=message):
        measured_plans.read(file(tmp_path, {offered()[0].plan: 1e-5}, **options))


def test_the_fit_finds_the_constants_that_made_the_times(tmp_path):
    """And leaves alone what no row tells of."""
    true = dataclasses.replace(MEASURED, launch=2 * MEASURED.launch, first=1.5 * MEASURED.first)
    (row,) = measured_plans.read(file(tmp_path, {each.plan: 1.0 for each in offered()}))
    samples = [dataclasses.replace(sample, seconds=sample.expect(true)) for sample in calibrate.samples_of(row)]
    fitted = calibrate.fit([samples], MEASURED)
    before, after = calibrate.quality([samples], MEASURED), calibrate.quality([samples], fitted)
    assert before.error > 0.05 and after.error < 0.005 and after.regret == pytest.approx(1.0)
    untold = [variant for variant in MEASURED.kernels if variant not in {sample.plan.variant for sample in samples}]
    assert untold and all(fitted.kernels[variant] == MEASURED.kernels[variant] for variant in untold)


def test_quality_is_what_the_choice_costs(tmp_path):
    first, *others = [each.plan for each in offered()]
    (row,) = measured_plans.read(file(tmp_path, {first: 3e-5, **dict.fromkeys(others, 2e-5)}))
    found = calibrate.quality([calibrate.samples_of(row)], MEASURED)
    assert found.regret == found.worst == pytest.approx(1.5)


def test_the_bundle_has_the_fastest_offered_plan(tmp_path):
    heuristic = heuristic_plan(PROBLEM, Direction.FORWARD, OPERANDS, H200)
    other = next(each.plan for each in offered() if each.plan != heuristic)
    gone = dataclasses.replace(other, num_stages=17)
    rows = measured_plans.read(file(tmp_path, {heuristic: 3e-5, other: 2e-5, gone: 1e-5}))
    path = bundle_plans.bundle(rows, tmp_path)
    assert path.name == "nvidia-h200.json" and [each.name for each in tmp_path.glob("*.lock")] == []
    (entry,) = database.read(path).values()
    assert (entry.plan, entry.microseconds, entry.heuristic_microseconds) == (other, 20.0, 30.0)


def test_the_planners_choice_stays_within_the_noise(tmp_path):
    heuristic = heuristic_plan(PROBLEM, Direction.FORWARD, OPERANDS, H200)
    other = next(each.plan for each in offered() if each.plan != heuristic)
    (row,) = measured_plans.read(file(tmp_path, {heuristic: 2.02e-5, other: 2e-5}))
    assert bundle_plans.entry(row).plan == heuristic


def test_a_row_of_plans_that_are_gone_is_an_error(tmp_path):
    gone = dataclasses.replace(offered()[0].plan, num_stages=17)
    (row,) = measured_plans.read(file(tmp_path, {gone: 1e-5}))
    with pytest.raises(ValueError, match="none of the plans"):
        bundle_plans.entry(row)


def test_every_bundled_plan_is_offered():
    """Else it would be left out in silence, and its line would be a lie."""
    bundled = list(database.BUNDLED.glob("*.json"))
    assert bundled
    for path in bundled:
        stored = json.loads(path.read_text())["plans"]
        assert stored and len(database.read(path)) == len(stored)
        for name, entry in database.read(path).items():
            assert entry.plan is not None and entry.microseconds > 0, name


@pytest.mark.parametrize("module", [calibrate, bundle_plans])
def test_the_commands_say_what_is_wrong(module, tmp_path, capsys):
    with pytest.raises(typer.Exit):
        module.main([file(tmp_path, {offered()[0].plan: 1e-5}, suite="conv")])
    assert "no measured plans" in capsys.readouterr().err


@pytest.mark.parametrize("name, device", [("NVIDIA H200", "H200"), ("NVIDIA GH200 480GB", "GH200")])
def test_a_device_is_the_one_of_the_longest_name(name, device):
    assert measured_plans.device_of(made_up.environment(device=name)).name == device
