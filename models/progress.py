"""Progress bars on a terminal, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def progress_bar(console: Console, *columns: ProgressColumn, shown: bool = True) -> Progress:
    """A bar with a description, how many are done, ``columns`` and the time that remains."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not shown or not console.is_terminal or console.quiet,
    )


def tracked(items: Sequence[T], words: str, shown: bool = True) -> Iterator[T]:
    """Yield ``items``, and show on standard error how many are done."""
    with progress_bar(Console(stderr=True), shown=shown) as bar:
        task = bar.add_task(words, total=len(items))
        for item in items:
            yield item
            bar.advance(task)
