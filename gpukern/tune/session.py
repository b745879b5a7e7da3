"""Tuning of many problems, one after the other. Each is saved when it is done, so that a later run can go on."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from gpukern.conv import ConvPlan, Entry, database, forget
from gpukern.info import driver_version, package_version
from gpukern.runtime.current_device import device_spec
from gpukern.tune.measurement import DeviceLost, Outcome, Timer, do_bench, heuristic_of, is_lost, measure, reason_of
from gpukern.tune.progress import Progress
from gpukern.tune.record import Call
from gpukern.tune.report import Report, Result
from gpukern.version import __version__


class TuneError(RuntimeError):
    """Nothing can be measured, or nothing more; the message gives the reason."""


def check_device(device: torch.device, timer: Timer | None) -> None:
    """Raise TuneError unless ``device`` can be measured."""
    if device.type != "cuda" and timer is None:
        here = "PyTorch sees none here" if not torch.cuda.is_available() else "the tensors are not on it"
        raise TuneError(f"tuning measures on a CUDA device, and {here}")


def tune_calls(
    calls: Iterable[Call],
    device: torch.device,
    *,
    folder: Path | str | None = None,
    minutes: float = math.inf,
    again: bool = False,
    progress: bool = True,
    timer: Timer | None = None,
) -> Report:
    """Measure ``calls`` on ``device``; see :func:`gpukern.tune.tune`."""
    check_device(device, timer)
    until = time.monotonic() + 60 * minutes
    path = Path(folder or default_folder()) / database.file_name(device_spec(device).name)
    session = _Session(path, device, timer or do_bench, versions())
    problems = distinct(calls)
    report = Report(path)
    try:
        # do_bench times on the current device; -1 means to leave it.
        with torch.cuda.device(device if device.type == "cuda" else -1), Progress(len(problems), progress) as bar:
            for name, call in problems.items():
                if not again and (entry := session.known(name, call)):
                    report.results.append(Result(str(call), entry, before=True))
                elif time.monotonic() >= until:
                    report.left += 1
                else:
                    bar.begin(str(call))
                    session.add(name, call, report, bar)
                bar.advance()
    finally:
        # Plans for which calls were prepared may no longer be the fastest.
        forget()
    return report


class _Session:
    """One file, one device."""

    def __init__(self, path: Path, device: torch.device, timer: Timer, versions: Mapping[str, str | None]) -> None:
        self._path, self._device, self._timer, self._versions = path, device, timer, versions
        with _file_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._before = database.read(path)

    def known(self, name: str, call: Call) -> Entry | None:
        """Return the earlier measurement of this very problem with these versions."""
        entry = self._unchanged(name)
        return entry if entry and entry.plan and entry.batch == call.problem.N else None

    def add(self, name: str, call: Call, report: Report, bar: Progress) -> None:
        """Measure ``call`` and save the result. If it fails as a whole, the others are still measured."""
        try:
            outcome = measure(call, self._device, self._timer, self._unfit(name), bar.watch)
        except DeviceLost as lost:
            self._store(name, call, Outcome(None, None, None, lost.rejected))
            raise TuneError(
                f"a plan for {call} made the device fail, and this process cannot use it any more. {lost}. "
                "It is noted: the same command again goes on without that plan"
            ) from lost
        except Exception as problem:
            if is_lost(self._device):
                raise TuneError(f"the device failed at {call}: {reason_of(problem)}") from problem
            report.failed.append((str(call), reason_of(problem)))
            return
        result = Result(str(call), self._store(name, call, outcome))
        report.results.append(result)
        bar.done(result)

    def _unchanged(self, name: str) -> Entry | None:
        entry = self._before.get(name)
        return entry if entry and entry.versions == self._versions else None

    def _unfit(self, name: str) -> dict[ConvPlan, str]:
        """Plans that ended a run before this problem was done: they would end this one too."""
        entry = self._unchanged(name)
        return dict(entry.rejected) if entry and entry.plan is None else {}

    def _store(self, name: str, call: Call, outcome: Outcome) -> Entry:
        entry = Entry(
            plan=outcome.plan,
            microseconds=_microseconds(outcome.seconds),
            heuristic=heuristic_of(call, self._device),
            heuristic_microseconds=_microseconds(outcome.heuristic_seconds),
            batch=call.problem.N,
            rejected=tuple(outcome.rejected.items()),
            versions=self._versions,
            date=datetime.date.today().isoformat(),
        )
        with _file_errors():
            database.store(self._path, device_spec(self._device).name, name, entry)
        return entry


def distinct(calls: Iterable[Call]) -> dict[str, Call]:
    """Return one call per key of the database: that of the bucket's own batch size, or else the first."""
    problems: dict[str, Call] = {}
    for call in calls:
        p = call.problem
        name = database.key(p, call.direction, call.operands)
        if name not in problems or database.bucket(p.N) == p.N:
            problems[name] = call
    return problems


def default_folder() -> Path:
    chosen = os.environ.get("GPUKERN_PLANS")
    return Path(chosen) if chosen else database.user_folder()


def versions() -> dict[str, str | None]:
    """Return the versions of everything that affects the speed of a plan."""
    return {
        "gpukern": __version__,
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "driver": driver_version(),
    }


@contextlib.contextmanager
def _file_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as problem:
        raise TuneError(f"the measured plans cannot be kept: {problem}") from problem


def _microseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e6 * seconds, 3)
