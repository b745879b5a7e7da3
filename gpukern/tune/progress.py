"""Progress display of tuning, on standard error: a bar on a terminal, else a line for each problem."""

from __future__ import annotations

import math
from types import TracebackType

from rich import progress
from rich.console import Console
from rich.markup import escape

from gpukern.formatting import micro
from gpukern.tune.report import Result


class Progress:
    """Progress through ``total`` problems; shows nothing unless ``wanted``."""

    def __init__(self, total: int, wanted: bool) -> None:
        self._console = Console(stderr=True, quiet=not wanted, highlight=False)
        self._bar = progress.Progress(
            progress.BarColumn(20),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.description}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total)
        self._name = ""

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def begin(self, name: str) -> None:
        self._name = escape(name)
        self._bar.update(self._task, description=self._name)

    def watch(self, done: int, total: int, best: float) -> None:
        """Show the current problem: plans done and in all, seconds of the fastest so far or infinity."""
        fastest = f", best {micro(best)}" if math.isfinite(best) else ""
        self._bar.update(self._task, description=f"{self._name}: plan {done + 1} of {total}{fastest}")

    def done(self, result: Result) -> None:
        if not self._console.is_terminal:
            self._console.print(f"{escape(result.name)}: {result}", soft_wrap=True)

    def advance(self) -> None:
        self._bar.advance(self._task)
