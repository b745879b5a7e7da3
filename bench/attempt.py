"""Record of a run's current candidate: after a hang or a crash the next run leaves out the one that ended this one.

``conv.trying`` beside ``conv.json`` names the candidate that runs. It is gone when the run ends by itself, be it
because it was asked to; where it is not, the device hung or the process died, and a watchdog ends a process that hangs.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import results
from gpukern.runtime.records import build, plain

#: The exit status of a run that left rows for another time (EX_TEMPFAIL of sysexits.h).
UNFINISHED = 75
#: A candidate that takes longer hangs: compiling for hours is worth no row either.
PATIENCE = 90.0
PATIENCE_OF_SLOW = 420.0


@dataclass(frozen=True)
class Attempt:
    """``key`` is of the row."""

    key: str
    name: str
    setting: str


class Attempts:
    """The file, and the watchdog for what it names."""

    def __init__(self, path: Path, save: Callable[[], None] = lambda: None) -> None:
        """``save`` writes down what is known already, before a process that hangs is ended."""
        self._path, self._save = path.with_suffix(".trying"), save
        self._timer: threading.Timer | None = None

    def left(self) -> Attempt | None:
        """The candidate that an earlier process was running when it hung or died."""
        try:
            return build(Attempt, json.loads(self._path.read_text()), "the attempt")
        except (OSError, ValueError):
            return None

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        """Cover the duration of the run; if it ends in Python, no candidate is to blame."""
        try:
            yield
        finally:
            self.done()

    def begin(self, attempt: Attempt, seconds: float) -> None:
        results.write_text(self._path, json.dumps(plain(attempt)) + "\n")
        self.wait(attempt, seconds)

    def wait(self, attempt: Attempt, seconds: float) -> None:
        """Another ``seconds`` for it."""
        self._stop()
        self._timer = threading.Timer(seconds, _give_up, (attempt, seconds, self._save))
        self._timer.daemon = True
        self._timer.start()

    def done(self) -> None:
        self._stop()
        self._path.unlink(missing_ok=True)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def _give_up(attempt: Attempt, seconds: float, save: Callable[[], None]) -> None:
    """A thread that waits for a device cannot be stopped; the process can."""
    with contextlib.suppress(Exception):
        save()
    print(f"bench: {attempt.name} on {attempt.key} hangs for {seconds:.0f} s; a new process can go on", file=sys.stderr)
    sys.stderr.flush()
    os._exit(UNFINISHED)
