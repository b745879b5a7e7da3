"""One row of a file, found again for a profiler."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from bench import one, results
from bench.results import Case
from bench.suite import Selection, Task, suites, tasks
from gpukern.runtime.mode import Mode, force_mode
from tests.bench import made_up

app = Typer()
app.command()(one.main)


def some(name: str) -> Task:
    """The last of LeNet's rows in the last of the suite's dtypes and layouts."""
    suite = suites()[name]
    return tasks(suite, Selection(("lenet",), (3,), suite.dtypes[-1:], suite.layouts[-1:], suite.computations))[-1]


def write(path: Path, *cases: Case) -> Path:
    results.write(path, made_up.results([made_up.row(10.0, of=case) for case in cases]))
    return path


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("name", ["conv", "epilogue", "pool", "linear", "model", "plans"])
def test_a_row_is_found_again(name, tmp_path):
    task = some(name)
    suite, found = one.find(write(tmp_path / "a.json", made_up.case(), task.case), task.case.key)
    assert suite is suites()[name] and found == task


@pytest.mark.parametrize("name", ["conv", "epilogue", "pool", "linear", "model"])
def test_it_runs_on_the_cpu(name, tmp_path):
    task = some(name)
    with force_mode(Mode.REFERENCE):
        ran = invoke(write(tmp_path / "a.json", task.case), task.case.key, "--cpu", "--calls", 2)
    assert ran.exit_code == 0, ran.output
    assert ran.stdout.startswith(f"{task.case.key}: 2 calls, norm of the result ")
    assert float(ran.stdout.split()[-1]) > 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, "has no row"),
        ({"suite": "gone"}, "this version of the benchmark has no row"),
        ({"uses": ()}, "this version of the benchmark has no row"),
        ({"problem": "2×2"}, "this version of the benchmark has no row"),
    ],
)
def test_a_row_that_is_not_there_is_refused_in_a_line(change, message, tmp_path):
    case = replace(some("conv").case, **change)
    key = case.key if change else "conv/no/such/row"
    ran = invoke(write(tmp_path / "a.json", case), key, "--cpu")
    assert ran.exit_code == 1 and len(ran.stderr.splitlines()) == 1 and f"{message} {key}" in ran.stderr


def test_no_file_no_results_no_gpu(tmp_path, monkeypatch):
    assert "No such file" in invoke(tmp_path / "none.json", "key").stderr
    (tmp_path / "broken.json").write_text("{")
    assert "not JSON" in invoke(tmp_path / "broken.json", "key").stderr
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    task = some("conv")
    ran = invoke(write(tmp_path / "a.json", task.case), task.case.key)
    assert ran.exit_code == 1 and ran.stderr == "bench: no CUDA device here; --cpu runs the row on the CPU\n"
