"""Runs that are stopped, taken up again, added to, and kept apart from others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import results
from bench import run as module
from bench.measure import DeviceLost
from bench.results import Candidate, Ceilings, ResultsError, Row, Use
from bench.run import Outcome, run
from bench.suite import Selection, suites, tasks
from tests.bench.tiny import CPU, QUICK, Products, candidate, product
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The device's limits take seconds to measure."""
    monkeypatch.setattr(module, "ceilings", lambda device: Ceilings(1e9, {"float32": 1e9}))


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "new folder" / "tiny.json"


def chosen(suite: Products, *networks: str) -> list:
    return tasks(suite, Selection(networks or ("lenet",), (2,), ("float32",), ("",), ("forward",)))


def measure_into(path: Path, suite: Products | None = None, networks=("lenet",), method=QUICK, **options) -> Outcome:
    suite = suite or Products()
    return run(suite, chosen(suite, *networks), method, CPU, path, **options)


def rows(path: Path) -> dict[str, Row]:
    return {row.case.problem: row for row in results.read(path).rows}


class Stopping(Products):
    """Raises in the tensors of the second row."""

    problem: BaseException = KeyboardInterrupt()

    def tensors(self, task, device):
        if task.problem[1] == 2 * len("lenet"):
            raise self.problem
        return super().tensors(task, device)


def test_rows_are_saved_as_they_come(path, monkeypatch):
    monkeypatch.setattr(module, "_SAVE_SHARE", 1e9)
    saved = []
    measure_into(path, on_row=lambda task, row: saved.append(len(rows(path)) if row else None))
    assert saved == [None, 1, None, 2, None, 3]


def test_a_large_file_is_not_rewritten_for_each_row_but_is_whole_in_the_end(path, monkeypatch):
    monkeypatch.setattr(module, "_SAVE_SHARE", 0.0)
    written = []
    write = results.write
    monkeypatch.setattr(module.results, "write", lambda *a: (written.append(1), write(*a)))
    outcome = measure_into(path)
    assert len(written) <= 2 and len(rows(path)) == 3
    assert outcome == replace(outcome, measured=3, found=0, left=0, stopped="")
    assert results.read(path) == outcome.results


# ---- stopped -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [KeyboardInterrupt, module.Interrupted])
def test_an_interrupted_run_keeps_what_it_has_and_goes_on(stop, path):
    suite = Stopping()
    suite.problem = stop()
    outcome = measure_into(path, suite)
    assert (outcome.measured, outcome.left, outcome.stopped) == (1, 2, "interrupted")
    first = rows(path)
    assert list(first) == ["2×1"]
    outcome = measure_into(path, resume=True)
    assert (outcome.measured, outcome.found, outcome.left, outcome.stopped) == (2, 1, 0, "")
    assert len(rows(path)) == 3 and rows(path)["2×1"] == first["2×1"]  # not measured again


def test_an_error_of_the_suite_itself_is_raised_and_loses_no_row(path):
    class Broken(Products):
        def work(self, task):
            if task.problem[1] > 1:
                raise ZeroDivisionError
            return super().work(task)

    with pytest.raises(ZeroDivisionError):
        measure_into(path, Broken())
    assert list(rows(path)) == ["2×1"]


def test_a_lost_device_stops_the_run_and_its_row_is_not_tried_again(path, monkeypatch):
    measured = []
    real = module.measure

    def measure(*given, **options):
        row = real(*given, **options)
        task = given[1]
        measured.append(task.case.problem)
        if len(measured) == 2:
            broken = Candidate("gpukern", "", "failed", "broke the device")
            raise DeviceLost(replace(row, candidates=(broken, *row.candidates[1:])))
        return row

    monkeypatch.setattr(module, "measure", measure)
    outcome = measure_into(path)
    assert (outcome.measured, outcome.left) == (2, 1)
    assert outcome.stopped.startswith("the device was lost on tiny/") and "a new process" in outcome.stopped
    assert rows(path)["2×10"].candidates[0].status == "failed"
    assert measure_into(path, resume=True).measured == 1 and measured == ["2×1", "2×10", "2×15"]


@pytest.mark.parametrize("until, measured", [(0.0, 0), (100.0, 3), (2.5, 2)])
def test_a_run_ends_before_the_row_that_would_begin_too_late(until, measured, path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def on_row(task, row):
        now[0] += 1.25 if row else 0

    outcome = measure_into(path, until=until, on_row=on_row)
    assert (outcome.measured, outcome.left) == (measured, 3 - measured)
    assert outcome.stopped == ("" if measured == 3 else "the time was up")
    assert len(rows(path)) == measured


# ---- taken up again ------------------------------------------------------------------------------------------------


def test_resume_measures_again_where_a_wanted_peer_is_missing(path):
    measure_into(path, method=replace(QUICK, peers=()))
    assert {len(row.candidates) for row in rows(path).values()} == {1}
    outcome = measure_into(path, resume=True)
    assert (outcome.measured, outcome.found) == (3, 0)
    assert {len(row.candidates) for row in rows(path).values()} == {2}
    # The other way round nothing is missing.
    assert measure_into(path, resume=True, method=replace(QUICK, peers=())).measured == 0
    assert {len(row.candidates) for row in rows(path).values()} == {2}


def test_without_resume_rows_are_measured_again_and_others_stay(path):
    suite = Products(candidate("gpukern", product))
    measure_into(path, suite)
    before = rows(path)
    outcome = measure_into(path, Products(candidate("gpukern", product), layers=2))
    assert (outcome.measured, outcome.found) == (2, 0)
    after = rows(path)
    assert list(after) == list(before) and after["2×15"] == before["2×15"]
    assert after["2×1"].candidates != before["2×1"].candidates


@pytest.mark.parametrize("resume", [True, False])
def test_rows_of_other_networks_stay_and_a_shared_one_has_both_uses(resume, path):
    measure_into(path)
    outcome = measure_into(path, networks=("vgg16x",), resume=resume)
    assert (outcome.measured, outcome.found) == ((2, 1) if resume else (3, 0))
    found = rows(path)
    assert set(found) == {"2×1", "2×10", "2×15", "2×12", "2×18"}
    assert found["2×1"].case.uses == (Use("lenet", "lenet.layer1", 1), Use("vgg16x", "vgg16x.layer1", 1))
    assert [use.network for use in found["2×10"].case.uses] == ["lenet"]


def test_fresh_forgets_even_what_cannot_be_read(path):
    measure_into(path)
    measure_into(path, Products(layers=1), fresh=True)
    assert list(rows(path)) == ["2×1"]
    path.write_text("{")
    with pytest.raises(ResultsError, match="not JSON"):
        measure_into(path)
    assert measure_into(path, fresh=True, resume=True).measured == 3


# ---- kept apart ----------------------------------------------------------------------------------------------------


def changed(path: Path, **changes) -> None:
    found = results.read(path)
    results.write(path, replace(found, environment=replace(found.environment, **changes)))


@pytest.mark.parametrize(
    "name, value",
    [("device", "another"), ("torch", "0"), ("source", "0"), ("driver", "1"), ("flags", {}), ("python", "2.7")],
)
def test_another_setup_is_refused_by_name_and_the_file_stays(name, value, path):
    measure_into(path)
    changed(path, **{name: value})
    before = path.read_bytes()
    for resume in (False, True):
        with pytest.raises(ResultsError, match=rf"was made under another {name}: choose another --out, or --fresh"):
            measure_into(path, resume=resume)
    assert path.read_bytes() == before


def test_everything_that_differs_is_named(path):
    measure_into(path)
    changed(path, torch="0", source="0")
    with pytest.raises(ResultsError, match="under another torch, source, method:"):
        measure_into(path, method=replace(QUICK, seconds=1.0))


def test_another_commit_with_the_same_code_goes_on(path):
    measure_into(path)
    changed(path, commit="another", modified=True, date="2001-01-01T00:00:00Z")
    assert measure_into(path, resume=True).measured == 0


def test_a_measured_row_never_joins_predictions(path):
    results.write_text(path, json.dumps({"schema": results.SCHEMA, "kind": "predicted", "rows": []}))
    before = path.read_bytes()
    with pytest.raises(ResultsError, match="kind 'predicted': nothing was measured"):
        measure_into(path, resume=True)
    assert path.read_bytes() == before


def test_a_place_that_cannot_be_written_is_known_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("")
    heard = []
    with pytest.raises(OSError):
        measure_into(tmp_path / "file" / "tiny.json", on_row=lambda task, row: heard.append(row))
    assert not heard


# ---- signals to a process ------------------------------------------------------------------------------------------


#: The command line, which stops to be interrupted in its second row: however slow the machine, it is not over before.
WAITING = """
import signal, time
import bench.run
from bench.cli import app

# A shell starts background jobs, and so all of a test run among them, with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
measure, rows = bench.run.measure, []
bench.run._SAVE_SHARE = float("inf")  # each row at once, however slow the disk is

def wait_in_the_second(*arguments, **options):
    rows.append(arguments)
    if len(rows) == 2:
        print("waiting", flush=True)
        time.sleep(300)
    return measure(*arguments, **options)

bench.run.measure = wait_in_the_second
app(prog_name="python -m bench")
"""


def bench(out: Path, *options: str, waiting: bool = False) -> subprocess.Popen:
    """Two short rows."""
    chosen = ("--suite", "lenet", "--batch", "1", "--computation", "forward", "--peers", "none", "--seconds", "0")
    program = ("-c", WAITING) if waiting else ("-m", "bench")
    command = [sys.executable, *program, "conv", "--cpu", *chosen, "--out", str(out), *options]
    environment = {k: v for k, v in os.environ.items() if k not in ("GPUKERN_EMULATE", "TRITON_INTERPRET")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_process_leaves_its_rows_and_another_completes_them(number, tmp_path):
    process = bench(tmp_path, waiting=True)
    assert process.stdout.readline() == "waiting\n", process.communicate()
    (path,) = tmp_path.rglob("conv.json")
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    (done,) = results.read(path).rows
    assert [each.name for each in path.parent.iterdir() if each.suffix != ".html"] == ["conv.json"]
    if number is signal.SIGKILL:
        return
    assert process.returncode == 75, errors
    assert errors.splitlines()[-1] == "bench: 1 row left, interrupted; --resume goes on" and "Traceback" not in errors
    assert path.with_suffix(".html").exists()
    if number is signal.SIGINT:
        resumed = bench(tmp_path, "--resume")
        output, errors = resumed.communicate(timeout=120)
        assert resumed.returncode == 0, errors
        assert "1 row measured, 1 found there" in output
        assert results.read(path).rows[0] == done and len(results.read(path).rows) == 2


def test_a_network_s_newer_layer_names_count(path):
    suite = Products(layers=1)
    measure_into(path, suite)
    (newer,) = (replace(each, case=replace(each.case, uses=(Use("lenet", "renamed", 2),))) for each in chosen(suite))
    for resume in (True, False):
        run(suite, [newer], QUICK, CPU, path, resume=resume)
        assert rows(path)["2×1"].case.uses == (Use("lenet", "renamed", 2),)


def test_one_network_is_worth_compiling_together_and_few_layers_are_not():
    def worth(suite: str, rows: int, device: str = "cuda") -> bool:
        return module._worth_compiling_together(suites()[suite], [None] * rows, torch.device(device))

    assert worth("inference", 1) and worth("model", 1) and worth("conv", 8)
    assert not worth("inference", 0) and not worth("conv", 7) and not worth("inference", 1, "cpu")
    assert not worth("optimizer", 99)  # nothing of it is Triton's


# ---- candidates, not rows ------------------------------------------------------------------------------------------


def stopping_at(name: str, problem: BaseException, when: int = 1):
    """A suite whose candidate ``name`` raises at its call number ``when``; the others are right."""
    calls = []

    def stopping(x, w):
        calls.append(1)
        if len(calls) == when:
            raise problem
        return product(x, w)

    names = "gpukern", "torch", "compiled"
    return Products(
        *(candidate(each, stopping if each == name else product, slow=each == "compiled") for each in names), layers=1
    )


def states(path: Path) -> dict[str, tuple[str, bool]]:
    (row,) = results.read(path).rows
    return {each.name: (each.status, bool(each.samples)) for each in row.candidates}


@pytest.mark.parametrize(
    "name, when, expected",
    [
        ("gpukern", 1, None),
        ("torch", 1, {"gpukern": ("ok", False)}),
        # While both are timed: each was checked, and reads as not timed.
        ("torch", 2, {"gpukern": ("ok", False), "torch": ("ok", False)}),
        # What compiles for long comes last; then nothing of what the others have is lost.
        ("compiled", 1, {"gpukern": ("ok", True), "torch": ("ok", True)}),
        ("compiled", 2, {"gpukern": ("ok", True), "torch": ("ok", True), "compiled": ("ok", False)}),
    ],
)
def test_a_stopped_run_loses_one_candidate_and_another_one_goes_on(name, when, expected, path, monkeypatch):
    monkeypatch.setattr(module, "_SAVE_SHARE", 0.0)
    outcome = measure_into(path, stopping_at(name, KeyboardInterrupt(), when))
    assert outcome.stopped == "interrupted" and outcome.left == 1
    assert (states(path) if outcome.results.rows else None) == expected
    assert not list(path.parent.glob("*.trying"))
    outcome = measure_into(path, stopping_at("nobody", KeyboardInterrupt()), resume=True)
    assert (outcome.measured, outcome.found, outcome.left) == (1, 0, 0)
    assert states(path) == dict.fromkeys(("gpukern", "torch", "compiled"), ("ok", True))


def test_a_second_stop_takes_nothing_of_the_first_away(path):
    measure_into(path, stopping_at("compiled", KeyboardInterrupt()))
    before = states(path)
    assert measure_into(path, stopping_at("torch", KeyboardInterrupt()), resume=True).stopped
    assert states(path) == before == {"gpukern": ("ok", True), "torch": ("ok", True)}


def test_what_broke_the_device_is_left_out_and_the_others_are_measured(path, monkeypatch):
    """In a new process; here the rest of the row is as if the device had been lost."""
    measure_into(path, stopping_at("nobody", KeyboardInterrupt()))
    found = results.read(path)
    (row,) = found.rows
    broken = Candidate("gpukern", "", "failed", "an illegal memory access")
    others = [replace(each, status="failed", message="not tried: gpukern broke", samples={}) for each in row.candidates]
    results.write(path, replace(found, rows=(replace(row, candidates=(broken, *others[1:])),)))
    outcome = measure_into(path, stopping_at("gpukern", AssertionError("run again")), resume=True)
    assert (outcome.measured, outcome.found) == (1, 0)
    assert states(path) == {"gpukern": ("failed", False), "torch": ("ok", True), "compiled": ("ok", True)}
    assert results.read(path).rows[0].candidates[0] == broken


HANGING = """
import sys, time
from pathlib import Path
from bench import run as module
from bench.results import Ceilings
from tests.bench.test_run import chosen
from tests.bench.tiny import CPU, QUICK, Products, candidate, product

module.ceilings = lambda device: Ceilings(1e9, {"float32": 1e9})
module.PATIENCE = 1.0

def hanging(x, w):
    time.sleep(60)

suite = Products(candidate("gpukern", product), candidate("torch", hanging), layers=1)
outcome = module.run(suite, chosen(suite), QUICK, CPU, Path(sys.argv[1]), resume=True)
print(outcome.measured)
"""


def test_a_hang_ends_the_process_and_is_not_waited_for_again(path, run_python):
    ended = run_python(HANGING, str(path))
    assert ended.returncode == 75, ended.stderr
    assert "torch on tiny/forward/float32//2×1 hangs for 1 s; a new process can go on" in ended.stderr
    assert states(path) == {"gpukern": ("ok", False)}
    ended = run_python(HANGING, str(path))
    assert ended.returncode == 0, ended.stderr
    assert states(path) == {"gpukern": ("ok", True), "torch": ("failed", False)}
    assert results.read(path).rows[0].candidates[1].message == "it hung, or ended the process"
    assert not list(path.parent.glob("*.trying"))
