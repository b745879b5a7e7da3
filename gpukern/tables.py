"""Tables of all commands: by rich on a terminal, as plain text anywhere else."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

#: Columns of output into a pipe: there is no window to fit, and nothing may be truncated.
WIDE = 180
#: Characters of a heading in a narrow table.
_NARROW = 13


class Column(NamedTuple):
    """A column. ``numbers``: whether its cells are numbers, flush right; ``total``: the text below them."""

    name: str
    numbers: bool = True
    total: str = ""


def numbers(*names: str) -> tuple[Column, ...]:
    """A column of numbers under each of ``names``."""
    return tuple(map(Column, names))


def table(*columns: str | Column, title: str = "", caption: str = "", narrow: bool = False) -> Table:
    """A table without rows. A column given by its name alone holds words, which break where it is too narrow.

    ``narrow``, for many columns: numbers never break, their headings do.
    """
    every = [column if isinstance(column, Column) else Column(column, numbers=False) for column in columns]
    made = Table(
        title=Text(title, style="bold") if title else None,
        caption=Text(caption, style="dim") if caption else None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 0, 0, 1) if narrow else (0, 1),
        show_footer=any(column.total for column in every),
    )
    for name, is_number, total in every:
        fixed = narrow and is_number
        heading = "\n".join(textwrap.wrap(name, _NARROW, break_long_words=False)) if fixed else name
        justify: Literal["right", "left"] = "right" if is_number else "left"
        made.add_column(Text(heading), total, justify=justify, overflow="fold", no_wrap=fixed, vertical="top")
    return made


def pairs(rows: Iterable[tuple[str, str | Text]]) -> Table:
    """A table of names and their values, without lines."""
    made = Table.grid(padding=(0, 2))
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(Text(name, style="bold"), Text(value) if isinstance(value, str) else value)
    return made


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table of Markdown, whose first ``left`` columns hold words and the others numbers."""
    lines = [head, ["---" if i < left else "---:" for i in range(len(head))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_text(shown: RenderableType, width: int = WIDE) -> str:
    """Return rich's output without colours and trailing spaces."""
    written = io.StringIO()
    console = Console(width=width, color_system=None, highlight=False, file=written)
    console.print(shown)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines()).strip("\n")


def show(shown: RenderableType, width: int = WIDE) -> None:
    """Print in colour on a terminal, as :func:`as_text` into anything else."""
    terminal = Console(highlight=False)
    if terminal.is_terminal:
        terminal.print(shown)
    else:
        print(as_text(shown, width), flush=True)  # before the next message on standard error
