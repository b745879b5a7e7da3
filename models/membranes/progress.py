"""A progress bar on a terminal, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def tracked(items: Sequence[T], words: str, shown: bool = True) -> Iterator[T]:
    """Yield ``items``, and show on standard error how many are done, if that is a terminal."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, transient=True, disable=not shown)
    with bar:
        task = bar.add_task(words, total=len(items))
        for item in items:
            yield item
            bar.advance(task)
