"""The stages of ``bench/gpu.sh``: check, tune, bench and profile, each a list of steps in the order of their value.

A step is a program. What each came to is kept in ``stages.json`` beside the results, for the same code on the same
device, so that a stage that ran out of time goes on with the first step that is not done.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from bench import results
from bench.command import RESULTS, UNFINISHED
from bench.environment import ROOT, device_name, run_name, slug
from bench.report.summary import summarize
from bench.results import Results

#: Less than this is not worth starting a step for, in seconds.
_LEAST = 20.0
#: Between SIGTERM, which saves, and SIGKILL.
_GRACE = 10.0

Status = Literal["passed", "failed", "unfinished", "not here"]


@dataclass(frozen=True)
class Step:
    name: str
    command: tuple[str, ...]
    #: A program that the machine may lack.
    needs: str = ""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """``last`` is the last line that the step printed: its own verdict."""

    status: Status
    seconds: float
    last: str


# ---- what the stages do --------------------------------------------------------------------------------------------


def check(folder: Path) -> list[Step]:
    """Every test on the GPU, then the kernels' tests once more under compute-sanitizer."""
    workers = str(max(1, min(12, (os.cpu_count() or 1) - 2)))

    def tests(name: str, *paths: str) -> Step:
        pytest = (sys.executable, "-m", "pytest", "-q", "-n", workers, "--maxfail=50", "--durations=5", *paths)
        return Step(name, pytest)

    def sanitized(tool: str, name: str, path: str, *options: str) -> Step:
        command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "5")
        pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", path, *options)
        # PyTorch's allocator hands out parts of large blocks, in which an access out of bounds stays unseen.
        return Step(f"{tool}-{name}", (*command, *pytest), tool, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})

    half = "-k", "forward_and_gradients and float16"
    steps = [
        Step("info", (sys.executable, "-m", "gpukern.cli", "info")),
        tests("conv2d", "tests/ops/test_conv2d.py"),
        tests("linear", "tests/ops/test_linear.py"),
        tests("pool2d", "tests/ops/test_pool2d.py"),
        tests("activation", "tests/ops/test_activation.py"),
        tests("layers", "tests/test_integration.py", "tests/test_convert.py", "tests/test_operators.py"),
        sanitized("memcheck", "conv2d", "tests/ops/test_conv2d.py", *half),
        sanitized("memcheck", "pool2d", "tests/ops/test_pool2d.py", "-k", "dtypes_and_layouts"),
        sanitized("racecheck", "conv2d", "tests/ops/test_conv2d.py", *half),
        tests("rest-of-ops", "tests/ops", "tests/runtime"),
        sanitized("memcheck", "linear", "tests/ops/test_linear.py", *half),
        sanitized("racecheck", "linear", "tests/ops/test_linear.py", *half),
        sanitized("racecheck", "pool2d", "tests/ops/test_pool2d.py", "-k", "dtypes_and_layouts"),
        tests("everything", "tests"),
    ]
    return [Step(s.name, s.command, "compute-sanitizer" if s.needs else "", s.environment) for s in steps]


def tune(folder: Path) -> list[Step]:
    """Other plans beside the chosen ones, for the layers that most of a network's time goes to."""
    step = _suite(folder)
    return [
        step("plans", "forward-32", "--computation", "forward"),
        step("plans", "input-gradient-32", "--computation", "input gradient"),
        step("plans", "weight-gradient-32", "--computation", "weight gradient"),
        step("plans", "forward-1", "--computation", "forward", "--batch", "1"),
        step("plans", "forward-128", "--computation", "forward", "--batch", "128"),
        step("plans", "mobilenet-32", "--suite", "mobilenet_v2", "--filter", "groups"),
        step("plans", "tf32-32", "--dtype", "tf32"),
    ]


def bench(folder: Path) -> list[Step]:
    """The suites against their peers: what most people ask first, first; what compiles for each row, last."""
    step = _suite(folder)
    library, everyone = ("--peers", "library"), ("--peers", "library", "--peers", "compile")
    everything = "--suite", "all"
    return [
        step("conv", "resnet50-32", *library),
        step("fused", "resnet50-32", *library),
        step("model", "resnet50-32", *everyone),
        step("pool", "all-32", *library, *everything),
        step("linear", "all-32", *library, *everything),
        step("conv", "resnet50-1", *library, "--batch", "1"),
        step("conv", "resnet50-128", *library, "--batch", "128"),
        step("conv", "mobilenet-32", *library, "--suite", "mobilenet_v2", "--suite", "efficientnet_b0"),
        step("fused", "resnet50-1", *library, "--batch", "1"),
        step("conv", "resnet50-tf32", *library, "--dtype", "tf32"),
        step("conv", "resnet50-nchw", *library, "--layout", "nchw"),
        step("model", "all-32", *library, *everything),
        step("conv", "all-32", *library, *everything),
        step("conv", "resnet50-bf16", *library, "--dtype", "bf16"),
        step("fused", "compile", *everyone, "--peers", "max-autotune"),
        step("conv", "compile", *everyone, "--peers", "max-autotune", "--computation", "forward"),
        step("conv", "resnet50-fp32", *library, "--dtype", "fp32"),
    ]


def profile(folder: Path) -> list[Step]:
    """Nsight Compute on gpukern's kernels of the three rows that lose most."""
    sections = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats")
    # The clocks stay as they are: they are the machine's to set.
    ncu = ["ncu", "--clock-control", "none", "--launch-count", "4", "--kernel-name", "regex:.*_kernel"]
    for section in sections:
        ncu += ["--section", section]
    return [
        Step(f"row-{number}", (*ncu, sys.executable, "-m", "bench.one", str(path), key), "ncu")
        for number, (path, key) in enumerate(worst_rows(folder), 1)
    ]


def _suite(folder: Path) -> Callable[..., Step]:
    out = str(folder.parent.parent)

    def step(suite: str, name: str, *options: str) -> Step:
        command = (sys.executable, "-m", "bench", suite, *options, "--out", out, "--resume")
        return Step(f"{suite}-{name}", command)

    return step


def worst_rows(folder: Path, number: int = 3) -> list[tuple[Path, str]]:
    """(file, key) of the rows where the best peer is furthest ahead, the worst first."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            read = results.read(path)
        except results.ResultsError:
            continue
        if isinstance(read, Results) and path.stem != "plans":
            for line in (line for group in summarize(read) for line in group.lines):
                if line.best is not None:
                    found.append((line.best.ratio.median, path, line.row.case.key))
    return [(path, key) for _, path, key in sorted(found)[:number]]


STAGES: dict[str, Callable[[Path], list[Step]]] = {s.__name__: s for s in (check, tune, bench, profile)}


# ---- running them --------------------------------------------------------------------------------------------------


class State:
    """``stages.json``: what each step of each stage came to."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "stages.json"
        self._done: dict[str, dict] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def get(self, stage: str, step: Step) -> Done | None:
        found = self._done.get(f"{stage}/{step.name}")
        return Done(**found) if found else None

    def put(self, stage: str, step: Step, done: Done) -> None:
        self._done[f"{stage}/{step.name}"] = asdict(done)
        results.write_text(self._path, json.dumps(self._done, indent=1) + "\n")


def run_stage(stage: str, steps: Iterable[Step], folder: Path, seconds: float) -> int:
    """Run what is not done yet until ``seconds`` are over; the exit status: 0, 1 (failed) or 75 (unfinished)."""
    state, until = State(folder), time.monotonic() + seconds
    steps = list(steps)
    with (folder / f"{stage}.log").open("a") as log:
        for step in steps:
            done = state.get(stage, step)
            if done is not None and done.status != "unfinished":
                continue
            left = until - time.monotonic()
            if left < min(_LEAST, seconds):
                break
            state.put(stage, step, run_step(step, log, left))
    return _verdict(stage, steps, state)


def run_step(step: Step, log, seconds: float) -> Done:
    """Run a step for at most ``seconds``, its output going to ``log``."""
    if step.needs and shutil.which(step.needs) is None:
        return Done("not here", 0.0, f"{step.needs} is not installed")
    print(f"== {step.name}", flush=True)
    begin = time.monotonic()
    log.write(f"\n== {step.name}: {' '.join(step.command)}\n")
    log.flush()
    start = log.tell()
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env={**os.environ, **step.environment},
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # so that its own processes are stopped with it
    )
    status = _wait(process, seconds)
    last = _last_line(Path(log.name), start)
    took = round(time.monotonic() - begin, 1)
    if status is None:
        return Done("unfinished", took, f"stopped after {took:.0f} s; {last}")
    known: dict[int, Status] = {0: "passed", UNFINISHED: "unfinished"}
    return Done(known.get(status, "failed"), took, last)


def _wait(process: subprocess.Popen, seconds: float) -> int | None:
    """The exit status, or None if it had to be stopped."""
    try:
        return process.wait(max(seconds - _GRACE, 1.0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return None


def _last_line(path: Path, start: int) -> str:
    with path.open(errors="replace") as file:
        file.seek(start)
        lines = [line.strip() for line in file if line.strip()]
    return lines[-1][:200] if lines else ""


def _verdict(stage: str, steps: list[Step], state: State) -> int:
    counts: dict[str, int] = {}
    print()
    for step in steps:
        done = state.get(stage, step) or Done("unfinished", 0.0, "not begun")
        counts[done.status] = counts.get(done.status, 0) + 1
        print(f"{done.status:<11}{step.name:<24}{done.seconds:>6.0f} s  {done.last}")
    print(f"{stage}: " + ", ".join(f"{number} {status}" for status, number in counts.items()))
    if counts.get("failed"):
        return 1
    return UNFINISHED if counts.get("unfinished") else 0


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in STAGES:
        print(f"usage: bash bench/gpu.sh {'|'.join(STAGES)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("bench/gpu.sh: no CUDA device here, and every stage needs one", file=sys.stderr)
        return 1
    stage = arguments[0]
    out = Path(os.environ.get("OUT") or RESULTS)
    place = Path(slug(device_name(torch.device("cuda")))) / run_name()
    folder = out / place
    folder.mkdir(parents=True, exist_ok=True)
    if out != RESULTS:
        for path in (RESULTS / place).glob("*.json"):
            if not (folder / path.name).exists():
                shutil.copy2(path, folder)
    steps = STAGES[stage](folder)
    if not steps:
        print(f"{stage}: nothing to do: no measured rows in {folder}; run bench first", file=sys.stderr)
        return 1
    return run_stage(stage, steps, folder, 60 * float(os.environ.get("MINUTES", "9")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
