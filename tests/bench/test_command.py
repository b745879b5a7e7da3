"""The command line as a user meets it: what it writes, and one clear line for whatever is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from bench import cli, command, results
from bench import run as run_module
from bench.results import Ceilings, Results
from gpukern.runtime.mode import Mode, force_mode
from tests.bench import made_up
from tests.conftest import ROOT

LENET = ("--cpu", "--suite", "lenet", "--batch", "1", "--seconds", "0")
ONE_ROW = (*LENET, "--computation", "forward", "--filter", "conv1", "--peers", "none")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Limits that are not measured, gpukern's reference, and a machine without a GPU."""
    monkeypatch.setattr(run_module, "ceilings", lambda device: Ceilings(1e9, {"float32": 1e9}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with force_mode(Mode.REFERENCE):
        yield


def bench(*arguments: object):
    ran = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], prog_name="python -m bench")
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception  # no traceback
    return ran


def refused(*arguments: object, status: int = 1) -> str:
    """The message: one line of its own on standard error, and nothing else."""
    ran = bench(*arguments)
    assert ran.exit_code == status and not ran.stdout, ran.output
    (line,) = (line for line in ran.stderr.splitlines() if not line.endswith((" row", " rows")))
    assert line.startswith("bench: ")
    return line.removeprefix("bench: ")


# ---- what the commands show and write ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "suite, rows", [("conv", 5), ("epilogue", 4), ("pool", 6), ("linear", 6), ("model", 2), ("inference", 1)]
)
def test_the_whole_harness_runs_on_a_cpu(suite, rows, tmp_path):
    ran = bench(suite, *LENET, "--out", tmp_path)
    assert ran.exit_code == 0, ran.output
    (path,) = tmp_path.rglob("*.json")
    found = results.read(path)
    assert isinstance(found, Results) and len(found.rows) == rows
    assert path.parent.parent.name.startswith("cpu-") and path.name == f"{suite}.json"
    assert all(row.candidates[0].status == "ok" and row.candidates[0].samples["wall"] for row in found.rows)
    assert "<html" in path.with_suffix(".html").read_text()
    assert f"{rows} row{'s' * (rows > 1)} measured: {path}, page beside it: {suite}.html" in ran.stdout
    assert "gpukern µs" in ran.stdout and "lenet" in ran.stdout and "predicted" not in ran.stdout
    assert found.environment.flags["cudnn.benchmark"] is True


def test_networks_and_batches_are_the_suite_s_unless_told_otherwise(monkeypatch):
    asked = []
    monkeypatch.setattr(command, "_measure", lambda suite, chosen, *settings, **o: asked.extend(t.case for t in chosen))
    bench("inference", "--cpu")
    networks = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0")
    found = sorted((case.sizes["network"], case.batch) for case in asked)
    assert found == sorted((name, batch) for name in networks for batch in (1, 32, 128))
    assert {(case.dtype, case.layout) for case in asked} == {("float32", "channels_last")}


def test_a_report_of_a_folder_skips_what_it_cannot_read(tmp_path):
    results.write(tmp_path / "a" / "conv.json", made_up.run())
    (tmp_path / "predicted.json").write_text(json.dumps({"schema": 1, "kind": "predicted"}))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "old.json").write_text(json.dumps({"schema": 0}))
    ran = bench("report", tmp_path)
    assert ran.exit_code == 0, ran.output
    skipped = ran.stderr.splitlines()
    assert len(skipped) == 3 and all(line.startswith("bench: skipped ") for line in skipped)
    assert "broken.json: not JSON" in skipped[0] and "old.json: schema 0, from an older version" in skipped[1]
    assert "predicted.json: kind 'predicted': nothing was measured" in skipped[2] and made_up.DEVICE in ran.stdout
    assert (tmp_path / "report.md").exists() and "<html" in (tmp_path / "report.html").read_text()
    ran = bench("report", tmp_path / "a" / "conv.json", "--markdown", tmp_path / "x.md", "--html", tmp_path / "x.html")
    assert ran.exit_code == 0 and (tmp_path / "x.md").exists() and (tmp_path / "x.html").exists()


def test_two_runs_are_compared_and_the_exit_status_says_the_verdict(tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    results.write(old, made_up.run())
    results.write(new, made_up.run(speed=0.8))
    slower = bench("--compare", old, new)
    assert slower.exit_code == 1 and "slower" in slower.stdout
    assert bench("--compare", new, old).exit_code == bench("--compare", old, old).exit_code == 0


def test_rows_of_other_options_stay_but_are_not_shown(tmp_path):
    bench("conv", *LENET, "--out", tmp_path, "--computation", "forward", "--filter", "conv1")
    ran = bench("conv", *LENET, "--out", tmp_path, "--computation", "forward", "--filter", "conv2")
    assert "lenet conv2" in ran.stdout and "lenet conv1" not in ran.stdout
    assert len(results.read(next(tmp_path.rglob("*.json"))).rows) == 2


def test_all_and_none(tmp_path):
    chosen = ("--dtype", "all", "--layout", "all", "--computation", "forward", "--filter", "conv1", "--peers", "none")
    assert bench("conv", *LENET, *chosen, "--out", tmp_path).exit_code == 0
    rows = results.read(next(tmp_path.rglob("*.json"))).rows
    # A CPU has no TF32.
    assert {(r.case.dtype, r.case.layout) for r in rows} == {
        (dtype, layout) for dtype in ("float16", "bfloat16", "float32") for layout in ("channels_last", "NCHW")
    }
    assert all(len(row.candidates) == 1 for row in rows)
    assert (
        refused("conv", *LENET, "--computation", "none", "--out", tmp_path) == "no row of this suite fits these options"
    )


def test_words_of_options_are_taken_in_any_case_and_once(tmp_path):
    words = "--dtype FP32 --dtype float32 --layout NHWC --layout channels_last --peers NONE --computation FORWARD"
    ran = bench("conv", *LENET, *words.split(), "--suite", "LeNet-5", "--out", tmp_path)
    assert ran.exit_code == 0, ran.output
    assert len(results.read(next(tmp_path.rglob("*.json"))).rows) == 2


# ---- stopped and resumed -------------------------------------------------------------------------------------------


def test_a_run_without_time_says_what_is_left_and_goes_on(tmp_path):
    chosen = ("conv", *LENET, "--computation", "forward", "--peers", "none", "--out", tmp_path)
    ran = bench(*chosen, "--minutes", 0)
    assert ran.exit_code == 75
    assert ran.stderr.splitlines()[-1] == "bench: 2 rows left, the time was up; --resume goes on"
    ran = bench(*chosen, "--resume", "--filter", "conv2")
    assert ran.exit_code == 0 and "1 row measured: " in ran.stdout
    ran = bench(*chosen, "--resume")
    assert ran.exit_code == 0 and "1 row measured, 1 found there: " in ran.stdout


def test_another_method_is_refused_by_name(tmp_path):
    bench("conv", *ONE_ROW, "--out", tmp_path)
    message = refused("conv", *ONE_ROW, "--out", tmp_path, "--warm")
    assert "conv.json was made under another method: choose another --out, or --fresh to replace it" in message
    assert bench("conv", *ONE_ROW, "--out", tmp_path, "--warm", "--fresh").exit_code == 0


# ---- what is wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "no CUDA device here; --cpu tries the harness, and gpukern explain network shows plans and floors"),
        (("--cpu", "--suite", "alexnet"), "unknown network 'alexnet': expected one of lenet, resnet18"),
        (("--cpu", "--dtype", "int8"), "--dtype int8: expected one of fp16, bf16, fp32, float16"),
        (("--cpu", "--dtype", "tf32"), "--dtype tf32: expected one of fp16, bf16, fp32, float16"),
        (("--cpu", "--layout", "chwn"), "--layout chwn: expected one of nhwc, channels_last, NCHW"),
        (("--cpu", "--computation", "back"), "--computation back: expected one of forward, input gradient"),
        (("--cpu", "--peers", "tvm"), "--peers tvm: expected one of library, compile, max-autotune, flaggems"),
        (("--cpu", "--filter", "nothing like it"), "no row of this suite fits these options"),
        (("--cpu", "--batch", 10**15), "Storage size calculation overflowed"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, message, tmp_path):
    assert refused("conv", *arguments, "--out", tmp_path).startswith(message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [("--batch", 0), ("--batch", "x"), ("--seconds", -1), ("--seconds", "nan"),
                                    ("--seconds", "inf"), ("--minutes", -1), ("--nonsense",)])  # fmt: skip
def test_numbers_that_mean_nothing_are_refused(option, tmp_path):
    ran = bench("conv", *LENET, "--out", tmp_path, *option)
    assert ran.exit_code == 2 and option[0] in ran.stderr and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused("conv", *LENET, "--out", tmp_path / "file")


def test_files_that_are_not_there_or_not_measured(tmp_path):
    measured, predicted = tmp_path / "measured.json", tmp_path / "predicted.json"
    results.write(measured, made_up.run())
    predicted.write_text(json.dumps({"schema": 1, "kind": "predicted"}))
    assert "No such file" in refused("--compare", measured, tmp_path / "none.json")
    assert "predicted.json: kind 'predicted': nothing was measured" in refused("--compare", measured, predicted)
    other = replace(made_up.run(), environment=made_up.environment(device="another"))
    results.write(tmp_path / "other.json", other)
    assert "different devices do not compare" in refused("--compare", measured, tmp_path / "other.json")
    assert bench("report", measured, "--markdown", measured / "x").stderr.startswith("bench: [Errno")
    ran = bench("report", tmp_path / "none")
    assert ran.exit_code == 1 and ran.stderr.splitlines()[-1] == "bench: no results there"


def test_a_broken_file_is_not_overwritten(tmp_path):
    bench("conv", *ONE_ROW, "--out", tmp_path)
    (path,) = tmp_path.rglob("*.json")
    path.write_text("{")
    assert "conv.json: not JSON" in refused("conv", *LENET, "--out", tmp_path)
    assert path.read_text() == "{"


def test_help_names_every_suite_and_what_may_be_chosen():
    ran = bench("--help")
    assert all(
        name in ran.stdout for name in ("conv", "epilogue", "pool", "linear", "model", "plans", "report", "--compare")
    )
    assert "input gradient" in bench("conv", "--help").stdout


def test_as_a_module_into_a_pipe_that_closes(tmp_path):
    path = tmp_path / "conv.json"
    results.write(path, made_up.run())
    command = [sys.executable, "-m", "bench", "report", str(path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)
    assert "Traceback" not in errors
