"""Runs steps, each a program, for as long as there is time, and remembers what each came to.

``stages.json`` beside the results keeps it, for the same code on the same device, so that a stage which ran out of time
goes on with the first step that is not done.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TextIO

from bench import results
from bench.attempt import UNFINISHED
from bench.environment import ROOT
from gpukern.runtime.records import build, plain

#: Seconds of timing per candidate of a row, in every stage: one method for all rows of a file.
SECONDS = "0.1"
#: Between two looks at what a step has left so far.
_MEANWHILE = 10.0
#: Less than this is not worth starting a step for, in seconds.
_LEAST = 20.0
#: How often a step may end by itself and leave something: each time a candidate hung or broke the device.
_TRIES = 4
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
    #: In seconds: a step that hangs takes no more from those after it.
    limit: float = float("inf")
    #: Whether it can be tried without a GPU, on the stub driver.
    dry: bool = True


def suite_step(
    folder: Path, suite: str, name: str, *options: str, seconds: str = SECONDS, limit: float = float("inf")
) -> Step:
    """Measure rows of a suite into ``folder``, going on where an earlier step stopped."""
    where = "--seconds", seconds, "--out", str(folder.parent.parent), "--resume"
    return Step(f"{suite}-{name}", (sys.executable, "-m", "bench", suite, *options, *where), limit=limit)


@dataclass(frozen=True)
class Done:
    """``last`` is the last line that the step printed: its own verdict."""

    status: Status
    seconds: float
    last: str


class State:
    """``stages.json``: what each step of each stage came to."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "stages.json"
        known = json.loads(self._path.read_text()) if self._path.exists() else {}
        self._done = build(dict[str, Done], known, str(self._path))

    def get(self, stage: str, step: Step) -> Done | None:
        return self._done.get(f"{stage}/{step.name}")

    def put(self, stage: str, step: Step, done: Done) -> None:
        self._done[f"{stage}/{step.name}"] = done
        results.write_text(self._path, json.dumps(plain(self._done), indent=1) + "\n")


def run_stage(
    stage: str,
    steps: Iterable[Step],
    folder: Path,
    seconds: float,
    after_each: Callable[[], None] = lambda: None,
) -> int:
    """Run what is not done yet until ``seconds`` are over; the exit status: 0, 1 (failed) or 75 (unfinished)."""
    state, until = State(folder), time.monotonic() + seconds
    steps = list(steps)
    with (folder / f"{stage}.log").open("a") as log:
        for step in steps:
            done = state.get(stage, step)
            if done is not None and done.status != "unfinished":
                continue
            for _ in range(_TRIES):
                left = until - time.monotonic()
                if left < min(_LEAST, seconds):
                    break
                done = run_step(step, log, min(left, step.limit), after_each)
                state.put(stage, step, done)
                after_each()
                if done.status != "unfinished" or done.seconds > min(left, step.limit) - 2 * _GRACE:
                    break
    return _verdict(stage, steps, state)


def run_step(step: Step, log: TextIO, seconds: float, meanwhile: Callable[[], None] = lambda: None) -> Done:
    """Run a step for at most ``seconds``, its output going to ``log``; ``meanwhile`` is called now and then."""
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
    try:
        status = _wait(process, seconds, meanwhile)
    finally:
        _stop(process)
    last = _last_line(Path(log.name), start)
    took = round(time.monotonic() - begin, 1)
    if status is None:
        return Done("unfinished", took, f"stopped after {took:.0f} s; {last}")
    known: dict[int, Status] = {0: "passed", UNFINISHED: "unfinished"}
    return Done(known.get(status, "failed"), took, last)


def _wait(process: subprocess.Popen, seconds: float, meanwhile: Callable[[], None]) -> int | None:
    """The exit status, or None if it takes longer."""
    until = time.monotonic() + max(seconds - _GRACE, 1.0)
    while (left := until - time.monotonic()) > 0:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(min(left, _MEANWHILE))
        meanwhile()
    return None


def _stop(process: subprocess.Popen) -> None:
    """End it, if it has not ended: asked first, so that it can save."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)


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
