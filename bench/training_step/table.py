"""One table for each network."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.table import Table

from bench.training_step.count import Traffic
from bench.training_step.paths import Step, Steps
from gpukern import tables
from gpukern.formatting import MISSING, number, ratio, size


def _rows() -> Iterator[tuple[str, Callable[[Step], int], Callable[[float], str]]]:
    yield "launches", lambda step: step.launches, "{:,}".format
    yield "  forward and loss", lambda step: step.forward.launches, "{:,}".format
    yield "  backward", lambda step: step.backward.launches, "{:,}".format
    yield "  optimizer", lambda step: step.optimizer, "{:,}".format
    yield "  PyTorch's operators", lambda step: step.moved.operators, "{:,}".format
    yield "activations moved", lambda step: step.moved.activations, size
    yield "  forward and loss", lambda step: step.forward.activations, size
    yield "  backward", lambda step: step.backward.activations, size
    yield "other bytes moved", lambda step: step.moved.other, size
    yield "saved for backward", lambda step: step.saved, size


def table(title: str, steps: Steps) -> Table:
    """The three ways side by side, and their ratios."""
    names = ("PyTorch", "convert", "compile", "convert / PyTorch", "compile / PyTorch", "compile / convert")
    made = tables.table("", *tables.numbers(*names), title=title, narrow=True)
    for name, read, written in _rows():
        pytorch, convert = read(steps.pytorch), read(steps.convert)
        compiled = None if steps.compile is None else read(steps.compile)
        cells = [MISSING if each is None else written(each) for each in (pytorch, convert, compiled)]
        pairs = (convert, pytorch), (compiled, pytorch), (compiled, convert)
        ratios = [ratio(a / b if a is not None and b else None) for a, b in pairs]
        made.add_row(name, *cells, *ratios)
    return made


def kernels(steps: Steps) -> Table:
    """Launches and bytes of all kinds by kernel and operator, those that move the most first."""
    ways = {"PyTorch": steps.pytorch, "convert": steps.convert}
    if steps.compile is not None:
        ways["compile"] = steps.compile
    headings = (f"{way}, {what}" for way in ways for what in ("launches", "MB"))
    made = tables.table("", *tables.numbers(*headings), narrow=True)
    names = {name for step in ways.values() for name in step.by_name}
    moved = {name: sum(step.by_name[name].bytes for step in ways.values() if name in step.by_name) for name in names}
    for name in sorted(names, key=lambda name: (-moved[name], name)):
        found = [step.by_name.get(name) for step in ways.values()]
        made.add_row(name, *(text for each in found for text in _of_kernel(each)))
    return made


def _of_kernel(found: Traffic | None) -> tuple[str, str]:
    return (MISSING, MISSING) if found is None else (f"{found.launches:,}", number(found.bytes / 1e6))
