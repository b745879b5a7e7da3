"""The stages of a GPU machine, tried without one: steps are small programs here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import cli, command, results, stages, steps
from bench.command import UNFINISHED
from bench.steps import Step, run_stage
from bench.suite import Selection, suites, tasks
from tests.bench import made_up

ROOT = Path(__file__).resolve().parents[2]


def program(name: str, code: str, **options) -> Step:
    return Step(name, (sys.executable, "-c", code), **options)


def came_to(folder: Path) -> dict[str, tuple[str, str]]:
    done = json.loads((folder / "stages.json").read_text())
    return {name: (step["status"], step["last"]) for name, step in done.items()}


# ---- running steps -------------------------------------------------------------------------------------------------


def test_each_step_leaves_its_status_and_last_line(tmp_path, capsys):
    status = run_stage(
        "check",
        [
            program("good", "print('hello'); print('7 passed')"),
            program("bad", "import sys; print('1 failed', file=sys.stderr); sys.exit(3)"),
            Step("elsewhere", ("no-such-profiler",), needs="no-such-profiler"),
            program("silent", ""),
            program("setting", "import os; print(os.environ['GIVEN'])", environment={"GIVEN": "by the step"}),
        ],
        tmp_path,
        60,
    )
    assert status == 1
    assert came_to(tmp_path) == {
        "check/good": ("passed", "7 passed"),
        "check/bad": ("failed", "1 failed"),
        "check/elsewhere": ("not here", "no-such-profiler is not installed"),
        "check/silent": ("passed", ""),
        "check/setting": ("passed", "by the step"),
    }
    assert capsys.readouterr().out.splitlines()[-1] == "check: 3 passed, 1 failed, 1 not here"
    assert "hello" in (tmp_path / "check.log").read_text()


def test_a_step_that_ended_by_itself_goes_on_at_once(tmp_path, capsys):
    """As one does that hung or lost the device: the next process leaves out what did it."""
    count = tmp_path / "count"
    write = f"open({str(count)!r}, 'a').write('x'); "
    code = f"{write}raise SystemExit({UNFINISHED} if len(open({str(count)!r}).read()) < 3 else 0)"
    seen = []
    status = run_stage("first", [program("lost", code), program("next", "")], tmp_path, 60, lambda: seen.append(1))
    assert status == 0 and count.read_text() == "xxx"
    assert came_to(tmp_path) == {"first/lost": ("passed", ""), "first/next": ("passed", "")}
    assert len(seen) == 4
    # Not for ever.
    count.write_text("")
    always = program("always", f"{write}raise SystemExit({UNFINISHED})")
    assert run_stage("first", [always], tmp_path, 60) == UNFINISHED and len(count.read_text()) == steps._TRIES


def test_a_step_has_a_limit_of_its_own_and_is_looked_at_meanwhile(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steps, "_GRACE", 0.5)
    monkeypatch.setattr(steps, "_MEANWHILE", 0.3)
    seen = []
    hanging = program("hangs", "import time; print('begun', flush=True); time.sleep(60)", limit=2.0)
    assert run_stage("first", [hanging, program("next", "")], tmp_path, 60, lambda: seen.append(1)) == UNFINISHED
    found = came_to(tmp_path)
    assert found["first/hangs"][0] == "unfinished" and found["first/hangs"][1].endswith("begun")
    assert found["first/next"][0] == "passed"
    assert len(seen) >= 4


def test_goes_on_where_it_stopped(tmp_path, capsys):
    count = tmp_path / "count"
    first = program("first", f"open({str(count)!r}, 'a').write('x')")
    later = program("later", f"import sys; sys.exit({UNFINISHED})")
    assert run_stage("bench", [first, later], tmp_path, 60) == UNFINISHED
    assert came_to(tmp_path)["bench/later"][0] == "unfinished"
    assert run_stage("bench", [first, program("later", "print('done')")], tmp_path, 60) == 0
    assert count.read_text() == "x"
    assert came_to(tmp_path)["bench/later"] == ("passed", "done")
    # Steps of the same name in another stage are others.
    run_stage("tune", [first], tmp_path, 60)
    assert count.read_text() == "xx"


def test_without_time_nothing_begins(tmp_path, capsys, monkeypatch):
    clock = iter([0.0, 50.0])
    monkeypatch.setattr(steps.time, "monotonic", lambda: next(clock))
    assert run_stage("check", [program("late", "print('never')")], tmp_path, 60) == UNFINISHED
    assert not (tmp_path / "stages.json").exists()
    assert "not begun" in capsys.readouterr().out


def test_a_step_is_asked_to_end_before_it_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "_GRACE", 3.0)
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('saved'))); "
    with (tmp_path / "log").open("a") as log:
        done = steps.run_step(program("slow", code + "print('begun', flush=True); time.sleep(60)"), log, 6.0)
    assert done.status == "unfinished" and done.last.endswith("saved")


def test_a_step_that_does_not_listen_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "_GRACE", 0.5)
    code = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); child = os.fork(); "
        "print(os.getpid(), flush=True) if child == 0 else None; time.sleep(60)"
    )
    with (tmp_path / "log").open("a") as log:
        done = steps.run_step(program("deaf", code), log, 2.5)
    assert done.status == "unfinished"
    child = int((tmp_path / "log").read_text().split()[-1])
    time.sleep(0.2)
    # Dead; where nobody has collected it yet, a zombie.
    stat = Path(f"/proc/{child}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


# ---- the stages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["first", "second", "more", "check", "tune", "bench"])
def test_steps_are_programs_with_names_of_their_own(stage, tmp_path):
    made = stages.STAGES[stage](tmp_path / "device" / "commit")
    assert len({step.name for step in made}) == len(made)
    for step in made:
        assert step.needs in ("", step.command[0])
        paths = [word for word in step.command if word.startswith("tests")]
        assert all((ROOT / path).exists() for path in paths)


@pytest.mark.parametrize("stage", ["first", "second", "more"])
def test_every_measuring_step_is_a_right_command(stage, tmp_path, run_python):
    """Each is parsed as the command line would, up to the point where it finds no GPU."""
    made = stages.STAGES[stage](tmp_path / "device" / "commit")
    # What is no suite has a test of its own command.
    measuring = [step for step in made if "bench" in step.command]
    commands = [step.command[step.command.index("bench") + 1 :] for step in measuring]
    code = """
import json, sys
from typer.testing import CliRunner
from bench import cli, command
tried = []

def measure(suite, chosen, method, device, out, **options):
    tried.append((suite.name, len(chosen), str(out)))

command._measure = measure
command.torch.cuda.is_available = lambda: True
for words in json.loads(sys.argv[1]):
    outcome = CliRunner().invoke(cli.app, words)
    assert outcome.exit_code == 0, (words, outcome.output)
print(json.dumps(tried))
"""
    outcome = run_python(code, json.dumps(commands))
    assert outcome.returncode == 0, outcome.stderr
    tried = json.loads(outcome.stdout)
    assert [name for name, _, _ in tried] == [words[0] for words in commands]
    assert all(rows > 0 and out == str(tmp_path) for _, rows, out in tried)
    if stage == "more":
        assert {name for name, _, _ in tried} == set(suites())


def test_the_worst_rows_are_profiled(tmp_path):
    def row(ratio: float, problem: str, **changes) -> results.Row:
        peers = {"cuDNN": {"graph": [100 * ratio] * 20}}
        uses = (results.Use("resnet50", "conv1", 1),)
        return made_up.row({"graph": [100.0] * 20}, peers, problem=problem, uses=uses, **changes)

    rows = [row(0.9, "b"), row(1.2, "d"), row(0.5, "a"), row(1.0, "c")]
    results.write(tmp_path / "conv.json", made_up.results(rows))
    # Other plans of gpukern's are nobody to lose against.
    results.write(tmp_path / "plans.json", made_up.results([row(0.1, "e", suite="plans")]))
    # A profile of a network's first launches says nothing of the others.
    network = made_up.row(
        {"graph": [100.0] * 20}, {"cuDNN": {"graph": [10.0] * 20}}, suite="model", sizes={"network": "x"}
    )
    results.write(tmp_path / "model.json", made_up.results([network]))
    (tmp_path / "stages.json").write_text("{}")
    assert [case.problem for case in stages.worst_rows(tmp_path)] == ["a", "b", "c"]
    made = stages.profile(tmp_path)
    assert [step.command[step.command.index("--filter") + 1] for step in made] == [
        case.key for case in stages.worst_rows(tmp_path)
    ]
    assert all(step.needs == "ncu" for step in made)
    assert len({step.name for step in made}) == 3 and made[0].name.endswith("-a")


@pytest.mark.parametrize("name", ["conv", "epilogue", "pool", "linear", "optimizer"])
def test_a_profile_is_of_its_row_alone(name, monkeypatch):
    """The last of LeNet's rows in the last of the suite's dtypes and layouts."""
    suite = suites()[name]
    some = Selection(("lenet",), suite.batches, suite.dtypes[-1:], suite.layouts[-1:], suite.computations)
    wanted = tasks(suite, some)[-1]
    measured = []

    def measure(suite, chosen, method, device, out, **options):
        measured.append((suite.name, chosen, method.peers, options["fresh"]))

    monkeypatch.setattr(command, "_measure", measure)
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
    *_, module, program = stages._alone(wanted.case)[:3]
    outcome = CliRunner().invoke(cli.app, stages._alone(wanted.case)[3:])
    assert (module, program, outcome.exit_code) == ("-m", "bench", 0), outcome.output
    assert measured == [(name, [wanted], (), True)]


def test_profiles_are_of_all_our_kernels_and_of_no_other(run_python):
    code = """
import importlib, json, pkgutil
import gpukern
from triton.runtime.jit import JITFunction
found = set()
for module in pkgutil.walk_packages(gpukern.__path__, "gpukern."):
    if not module.name.endswith("__main__"):
        found |= {n for n, v in vars(importlib.import_module(module.name)).items() if isinstance(v, JITFunction)}
print(json.dumps(sorted(name for name in found if name.endswith("_kernel"))))
"""
    ran = run_python(code)
    assert ran.returncode == 0, ran.stderr
    assert stages.kernel_names() == json.loads(ran.stdout.splitlines()[-1])


def test_the_aim_is_measured_first(tmp_path):
    """ResNet-50 for inference at the batch of the aim."""
    command = stages.bench(tmp_path / "device" / "commit")[0].command
    assert command[3:] == (
        "inference", "--peers", "library", "--suite", "resnet50", "--batch", "128", "--batch", "32", "--batch", "1",
        "--seconds", "0.1", "--out", str(tmp_path), "--resume",
    )  # fmt: skip


@pytest.mark.parametrize("stage", ["first", "second", "more", "bench"])
def test_libraries_come_before_compilers_and_those_that_try_everything_last(stage, tmp_path):
    folder = tmp_path / "device" / "commit"
    cost = [
        2 if "max-autotune" in step.command else 1 if "compile" in step.command else 0
        for step in stages.STAGES[stage](folder)
        if "library" in step.command
    ]
    assert cost == sorted(cost) and (2 in cost) == (stage in ("more", "bench"))


@pytest.mark.parametrize("stage", ["first", "second"])
def test_no_step_of_a_short_call_takes_all_of_its_time(stage, tmp_path):
    made = stages.STAGES[stage](tmp_path / "device" / "commit")
    assert max(step.limit for step in made) <= 60 * stages.MINUTES[stage] / 2


def test_rows_of_one_file_are_measured_in_one_way(tmp_path):
    folder = tmp_path / "device" / "commit"
    method: dict[str, set] = {}
    for stage in ("first", "second", "more", "tune", "bench"):
        for step in stages.STAGES[stage](folder):
            if "--resume" in step.command:
                seconds = step.command[step.command.index("--seconds") + 1]
                method.setdefault(step.command[3], set()).add(seconds)
    assert set(method) == set(suites()) and all(len(found) == 1 for found in method.values())


def test_headlines_tell_who_won(tmp_path):
    rows = [made_up.row({"graph": [10.0] * 20}, {"cuDNN": {"graph": [5.0] * 20}}), made_up.row("failed", problem="x")]
    results.write(tmp_path / "conv.json", made_up.results(rows))
    (line,) = stages.headlines(tmp_path)
    assert line.startswith("0.50×  conv · forward · float16")
    assert line.endswith("0 wins, 1 loss, 0 ties, 1 rows of gpukern not ok")


# ---- the script ----------------------------------------------------------------------------------------------------


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("OUT", "GPUKERN_EMULATE")}
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments],
        capture_output=True,
        text=True,
        env={**inherited, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment},
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("stage", list(stages.STAGES))
def test_without_a_gpu_one_clear_line(stage, tmp_path):
    outcome = script(stage, OUT=str(tmp_path))
    assert outcome.returncode == 1 and outcome.stdout == ""
    assert outcome.stderr == "bench/gpu.sh: no CUDA device here, and every stage needs one\n"
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_stage():
    outcome = script("everything")
    assert outcome.returncode == 2 and "first|second|more|check|tune|bench|profile" in outcome.stderr


@pytest.fixture
def pretended_gpu(monkeypatch, tmp_path):
    """The folder of results of a GPU that is one by name alone."""
    monkeypatch.setattr(stages.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(stages, "run_folder", lambda device: Path("made-up-gpu") / "commit")
    monkeypatch.setattr(stages, "RESULTS", tmp_path / "kept")
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # which a stage sets
    monkeypatch.setattr(stages.carried, "unpack", lambda: "no kernels")
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path / "kept" / "made-up-gpu" / "commit"
    signal.signal(signal.SIGTERM, before)


def test_another_machine_goes_on_from_what_was_packed(pretended_gpu, monkeypatch, tmp_path, capsys):
    out, count = tmp_path / "out", tmp_path / "count"
    monkeypatch.setenv("OUT", str(out))

    def steps_of(folder: Path) -> list[Step]:
        results.write(folder / "conv.json", made_up.run())
        return [program("done", f"open({str(count)!r}, 'a').write('x')"), program("broken", "raise SystemExit(1)")]

    monkeypatch.setitem(stages.STAGES, "bench", steps_of)
    assert stages.main(["bench"]) == 1
    assert "  conv · forward · float16" in capsys.readouterr().out
    pretended_gpu.rename(tmp_path / "lost")
    shutil.unpack_archive(out / "results.tar.gz", tmp_path / "kept")
    expected = {"conv.json", "stages.json", "bench.log", "report.html"}
    assert {path.name for path in pretended_gpu.iterdir()} == expected
    assert [path.name for path in out.iterdir()] == ["results.tar.gz"]
    assert stages.main(["bench"]) == 1
    assert count.read_text() == "x"


def test_packed_after_each_step(pretended_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    listing = f"import tarfile; print(tarfile.open({str(tmp_path / 'out' / 'results.tar.gz')!r}).getnames())"
    monkeypatch.setitem(stages.STAGES, "check", lambda folder: [program("first", ""), program("second", listing)])
    assert stages.main(["check"]) == 0
    assert "made-up-gpu/commit/stages.json" in came_to(pretended_gpu)["check/second"][1]


def test_packing_survives_a_file_that_is_gone_or_grows(pretended_gpu, monkeypatch, tmp_path):
    pretended_gpu.mkdir(parents=True)
    for name in ("conv.json", "conv.trying", "first.log"):
        (pretended_gpu / name).write_text("as it was")
    read = Path.read_bytes

    def changing(path: Path) -> bytes:
        if path.name == "conv.trying":
            path.unlink()
        content = read(path)
        path.write_bytes(content + b" and more")
        return content

    monkeypatch.setattr(Path, "read_bytes", changing)
    stages._pack(pretended_gpu, Path("made-up-gpu") / "commit", str(tmp_path / "out"))
    shutil.unpack_archive(tmp_path / "out" / "results.tar.gz", tmp_path / "home")
    found = {path.name: path.read_text() for path in (tmp_path / "home" / "made-up-gpu" / "commit").iterdir()}
    assert found == {"conv.json": "as it was", "first.log": "as it was"}


def test_profile_before_bench(pretended_gpu, capsys):
    assert stages.main(["profile"]) == 1
    assert "run bench first" in capsys.readouterr().err
