"""A progress bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, NamedTuple

from rich.console import Console
from rich.errors import LiveError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Shown(NamedTuple):
    """``track`` shows how far an iterable is, ``tell`` what is done next."""

    track: Callable[[Iterable[Any]], Iterable[Any]]
    tell: Callable[[str], None]


@contextlib.contextmanager
def shown_progress() -> Iterator[Shown]:
    """Show progress on standard error while the block runs, if that is a terminal that shows no other already."""
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
    shown = Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal)
    try:
        shown.start()
    except LiveError:
        shown.disable = True
    task = shown.add_task("calibrating", total=None)

    def track(batches: Iterable[Any]) -> Iterator[Any]:
        shown.update(task, total=len(batches) if isinstance(batches, Sized) else None)
        for batch in batches:
            yield batch
            shown.advance(task)

    def tell(words: str) -> None:
        shown.update(task, description=f"quantizing: {words}")

    try:
        yield Shown(track, tell)
    finally:
        if not shown.disable:
            shown.stop()
