"""A run: the rows of a suite one after the other, saved as they come, taken up again where they stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench import results
from bench.attempt import PATIENCE, PATIENCE_OF_SLOW, Attempt, Attempts
from bench.ceilings import ceilings
from bench.environment import environment, now
from bench.lease import carried
from bench.measure import NOT_TRIED, DeviceLost, Method, measure
from bench.peers import torch_at_its_best
from bench.precompile import precompile
from bench.results import Candidate, Results, ResultsError, Row, Use
from bench.suite import Implementation, Suite, Task, merged
from gpukern.runtime.current_device import device_spec

#: Share of a run's time that may go into writing its file, which grows with each row.
_SAVE_SHARE = 0.1
#: Starting the processes that compile together takes as long as a few kernels.
_WORTH_COMPILING_TOGETHER = 8


class Interrupted(BaseException):
    """SIGTERM: like KeyboardInterrupt, no candidate's failure."""


@dataclass(frozen=True)
class Outcome:
    results: Results
    #: Rows measured now, found in the file, and left for another time.
    measured: int
    found: int
    left: int
    #: Why rows were left; empty if none was.
    stopped: str = ""


def run(
    suite: Suite,
    tasks: Sequence[Task],
    method: Method,
    device: torch.device,
    path: Path,
    *,
    resume: bool = False,
    fresh: bool = False,
    until: float = float("inf"),
    on_row: Callable[[Task, Row | None], None] = lambda task, row: None,
    on_compiled: Callable[[float], None] = lambda tasks: None,
) -> Outcome:
    """Measure ``tasks`` into ``path``, where rows of other tasks stay.

    ``resume`` leaves out rows that the file has with all candidates that are asked for, and goes on with one that has
    some: each is saved as it is checked and as it is timed. What broke the device or hung is left out then, and the
    others of its row are measured. ``fresh`` forgets what the file has. ``until`` (of :func:`time.monotonic`) ends the
    run before the next row. ``on_row`` gets each task with None before it, and with its row after it;
    ``on_compiled`` of how many tasks' kernels were compiled ahead.

    :class:`bench.results.ResultsError` if the file was made on another device, with other versions, other code or
    another method: its rows cannot stand beside new ones.
    """
    file = _File(path, method, device, fresh)
    attempts = Attempts(path, file.save)
    if resume and (hung := attempts.left()):
        file.blame(hung)
    found = {task.case.key for task in tasks if resume and file.has(suite, task, method, device)}
    for task in tasks:
        if task.case.key in found:
            file.add_uses(task)
    waiting = [task for task in tasks if task.case.key not in found]
    measured, stopped = 0, ""
    try:
        with _terminated_as_interrupted(), attempts.going_on():
            uncompiled = [task for task in waiting if task.case.key not in carried.rows()]
            if _worth_compiling_together(suite, uncompiled, device):
                precompile(suite.name, uncompiled, device_spec(device), on_done=on_compiled, peers=method.peers)
            for task in waiting:
                if time.monotonic() >= until:
                    stopped = "the time was up"
                    break
                on_row(task, None)
                row = _measured(suite, task, method, device, file, attempts)
                file.add(row)
                measured += 1
                on_row(task, row)
                if device.type == "cuda":
                    torch.cuda.empty_cache()  # graphs and rows of other sizes would crowd the next one
    except DeviceLost as lost:
        file.add(lost.row)
        measured += 1
        stopped = f"{lost}; a new process can go on"
    except (KeyboardInterrupt, Interrupted):
        stopped = "interrupted"
    finally:
        file.save()
    return Outcome(file.results, measured, len(found), len(waiting) - measured, stopped)


def _measured(suite: Suite, task: Task, method: Method, device: torch.device, file: _File, attempts: Attempts) -> Row:
    current = Attempt(task.case.key, "", ""), PATIENCE

    def on_try(each: Implementation) -> None:
        nonlocal current
        current = Attempt(task.case.key, each.name, each.setting), PATIENCE_OF_SLOW if each.slow else PATIENCE
        attempts.begin(*current)

    def on_candidate(row: Row) -> None:
        file.add_unfinished(row)
        attempts.wait(*current)  # for the timing that follows

    spared = file.spared(task)
    row = measure(suite, task, method, device, spared=spared, on_try=on_try, on_candidate=on_candidate)
    attempts.done()
    return row


class _File:
    def __init__(self, path: Path, method: Method, device: torch.device, fresh: bool) -> None:
        self._path = path
        self._saved_at = self._took = 0.0
        #: By the key of the row.
        self._blamed: dict[str, tuple[Candidate, ...]] = {}
        with torch_at_its_best("float32"):  # the TF32 settings follow each row's dtype
            made = environment(device)
        described = {name: value for name, value in dataclasses.asdict(method).items() if name != "peers"}
        old = None if fresh or not path.exists() else results.read(path)
        if old is not None:
            self._check(old, made, described)
        # Rather now than after the first row was measured: can anything be written there?
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        self._rows = {row.case.key: row for row in old.rows} if old else {}
        self.results = Results(made, old.ceilings if old else ceilings(device), described, tuple(self._rows.values()))
        if old is None:
            self.save()  # measuring the device's own limits takes seconds

    def _check(self, old: Results, made: results.Environment, method: dict) -> None:
        different = made.same_setup(old.environment) + (["method"] if method != old.method else [])
        if different:
            advice = "choose another --out, or --fresh to replace it"
            raise ResultsError(f"{self._path} was made under another {', '.join(different)}: {advice}")

    def has(self, suite: Suite, task: Task, method: Method, device: torch.device) -> bool:
        row = self._rows.get(task.case.key)
        if row is None:
            return False
        wanted = {implementation.name for implementation in suite.implementations(task, method.peers, device)}
        return wanted <= {candidate.name for candidate in row.candidates if _is_done(candidate)}

    def spared(self, task: Task) -> tuple[Candidate, ...]:
        """Return the failed candidates of an unfinished row: they may have kept the others from being measured."""
        row, blamed = self._rows.get(task.case.key), self._blamed.get(task.case.key, ())
        return (
            *blamed,
            *(each for each in (row.candidates if row else ()) if each.status == "failed" and _is_done(each)),
        )

    def blame(self, hung: Attempt) -> None:
        """Blame the candidate that was running when an earlier run ended."""
        candidate = Candidate(hung.name, hung.setting, "failed", "it hung, or ended the process")
        self._blamed[hung.key] = (candidate,)

    def add(self, row: Row) -> None:
        known = self._rows.get(row.case.key)
        self._rows[row.case.key] = row if known is None else _with_uses(row, known.case.uses, row.case.uses)
        self._save_now_or_later()

    def add_unfinished(self, row: Row) -> None:
        """Add an unfinished row, unless the file has more of it from a run that got further."""
        known = self._rows.get(row.case.key)
        if known is None or _timed(known) <= _timed(row):
            self.add(row)

    def add_uses(self, task: Task) -> None:
        """A network that was measured earlier shares the row with one asked for now."""
        known = self._rows[task.case.key]
        self._rows[task.case.key] = _with_uses(known, known.case.uses, task.case.uses)

    def save(self) -> None:
        begin = time.monotonic()
        made = replace(self.results.environment, date=now())
        self.results = replace(self.results, environment=made, rows=tuple(self._rows.values()))
        results.write(self._path, self.results)
        self._saved_at = time.monotonic()
        self._took = self._saved_at - begin

    def _save_now_or_later(self) -> None:
        if (time.monotonic() - self._saved_at) * _SAVE_SHARE >= self._took:
            self.save()


def _is_done(candidate: Candidate) -> bool:
    """Whether there is no more to be had of it."""
    if candidate.status == "ok":
        return any(candidate.samples.values())
    return not candidate.message.startswith(NOT_TRIED)


def _timed(row: Row) -> set[str]:
    return {each.name for each in row.candidates if any(each.samples.values())}


def _with_uses(row: Row, old: tuple[Use, ...], new: tuple[Use, ...]) -> Row:
    return replace(row, case=replace(row.case, uses=merged(old, new)))


def _worth_compiling_together(suite: Suite, waiting: Sequence[Task], device: torch.device) -> bool:
    many = len(waiting) >= _WORTH_COMPILING_TOGETHER or (suite.many_kernels and bool(waiting))
    return device.type == "cuda" and suite.in_triton and many


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, which a time limit sends, saves like Ctrl-C."""

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread, which alone gets signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
