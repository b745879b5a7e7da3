"""One table for each network."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.table import Table

from bench.training_step.paths import Step, Steps
from gpukern import tables
from gpukern.formatting import MISSING, ratio, size


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
