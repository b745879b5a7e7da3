"""The parts of a network on a terminal, as plain text in a pipe, as Markdown and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gpukern import tables
from gpukern.explain.network import Part, total
from gpukern.formatting import count, number, percent, ratio
from gpukern.info import package_version
from gpukern.version import __version__

#: Columns of output into a pipe: there is no window to fit, and nothing may be truncated.
_WIDE = 200
#: Batch size → the parts of a pass.
Batches = Mapping[int, Sequence[Part]]

_LEGEND = (
    "**Predicted, not measured**: made by `gpukern explain network` on a machine that needs no GPU. *Floor* is what no "
    "implementation can beat: bytes at the full bandwidth or products at the full rate, whichever takes longer. "
    "*Bound* is what this plan cannot beat: its tiles as they are, in whole waves, and all that it moves. *Expected* "
    "adds what tiles, main loops, latencies and launches of products are estimated to cost. Registers, spills and the "
    "instructions of one turn of the main loop are read off the compiled code of the main kernel."
)

_Column = tuple[str, Callable[[Part], str]]
_WORDS: tuple[_Column, ...] = (
    ("layer", lambda part: f"{part.layer} ({part.count}×)" if part.count > 1 else part.layer),
    ("computation", lambda part: part.computation),
    ("problem", lambda part: part.problem),
    ("plan", lambda part: part.plan),
    ("bound by", lambda part: part.bound),
)
_NUMBERS: tuple[_Column, ...] = (
    ("launches", lambda part: str(part.launches)),
    ("waves", lambda part: number(part.waves)),
    ("efficiency", lambda part: percent(part.efficiency)),
    ("floor µs", lambda part: number(part.floor_us)),
    ("bound µs", lambda part: number(part.bound_us)),
    ("expected µs", lambda part: number(part.expected_us)),
    ("expected / floor", lambda part: ratio(part.expected_us / part.floor_us)),
)


def _code(name: str) -> _Column:
    return name, lambda part: "–" if getattr(part, name) is None else str(getattr(part, name))


_CODE: tuple[_Column, ...] = tuple(map(_code, ("registers", "spills", "loop")))


def columns(found: Sequence[Part]) -> tuple[list[_Column], list[_Column]]:
    """Return the informative (words, numbers) columns of ``found``: no computation if all agree, no absent code."""
    alike = len({part.computation for part in found}) == 1
    words = [column for column in _WORDS if not (alike and column[0] == "computation")]
    compiled = any(part.registers is not None for part in found)
    return words, [*_NUMBERS, *(_CODE if compiled else ())]


def summary(found: Sequence[Part], batch: int) -> str:
    """The whole network at one batch size: every layer as often as it has it."""
    every = total(found)
    names = "floor", "bound", "expected"
    times = ", ".join(f"{name} {number(getattr(every, f'{name}_us'))} µs" for name in names)
    share, images = ratio(every.expected_us / every.floor_us), number(batch / every.expected_us * 1e6)
    calls = count(sum(part.count for part in found), "call")
    return f"All {calls}, {every.plan}: {times}, {share} the floor; {images} images/s as expected."


# ---- forms ---------------------------------------------------------------------------------------------------------


def print_network(batches: Batches, heading: str) -> None:
    """A table for each batch size, in colour on a terminal, as plain text into anything else."""
    shown: list[RenderableType] = [Text(f"{heading}: predicted, not measured", style="bold")]
    for batch, found in batches.items():
        notes = (Text(note, style="dim") for note in _notes(found))
        shown += [Text(), _table(found, f"Batch {batch}", summary(found, batch)), *notes]
    tables.show(Group(*shown), _WIDE)


def _table(found: Sequence[Part], title: str, caption: str) -> Table:
    words, numbers = columns(found)
    names = [name for name, _ in words], tables.numbers(*(name for name, _ in numbers))
    table = tables.table(*names[0], *names[1], title=title, caption=caption, narrow=True)
    for part in found:
        table.add_row(*(Text(cell(part)) for _, cell in (*words, *numbers)))
    return table


def markdown(batches: Batches, heading: str) -> str:
    """A page for the documentation: heading, legend, versions, and a table for each batch size."""
    blocks = [f"# {heading}", _LEGEND, f"{_versions()}."]
    for batch, found in batches.items():
        words, numbers = columns(found)
        cells = [[cell(part) for _, cell in (*words, *numbers)] for part in found]
        table = tables.markdown([name for name, _ in (*words, *numbers)], cells, left=len(words))
        blocks += [f"## Batch {batch}", summary(found, batch), table, *(f"- {note}" for note in _notes(found))]
    return "\n\n".join(blocks) + "\n"


def as_json(batches: Batches) -> list[dict[str, Any]]:
    """A list of batch sizes, each with its parts and their sum."""
    return [
        {"batch": batch, "total": dataclasses.asdict(total(found)), "parts": [dataclasses.asdict(e) for e in found]}
        for batch, found in batches.items()
    ]


def _notes(found: Sequence[Part]) -> list[str]:
    """Why there is no machine code, each reason once."""
    return list(dict.fromkeys(part.note for part in found if part.note))


def _versions() -> str:
    others = ((name, package_version(name)) for name in ("torch", "triton"))
    return ", ".join(
        [f"gpukern {__version__}", *(f"{name} {found}" if found else f"no {name}" for name, found in others)]
    )
