"""The report of a fusion: ``values`` that it is made of, and its forms: JSON, ``terminal`` and ``html``."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpukern.fusion.report.values import (
    FusedGroup,
    GraphNode,
    NotFused,
    Quantization,
    QuantizedGroup,
    Reached,
    ReportValues,
    Timing,
    Totals,
    Verification,
)
from gpukern.runtime.files import write_text
from gpukern.runtime.records import build, plain

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = [
    "FusedGroup",
    "FusionReport",
    "GraphNode",
    "NotFused",
    "Quantization",
    "QuantizedGroup",
    "Reached",
    "Timing",
    "Totals",
    "Verification",
]

#: The name of the JSON's form, another one whenever the meaning of a field changes.
FORMAT = "gpukern fusion report, version 1"
#: Its name inside a saved model.
IN_ARCHIVE = "gpukern_report.json"


@dataclass(frozen=True)
class FusionReport(ReportValues):
    """Report of :func:`gpukern.fuse`. ``str()`` and rich print it; it compares by its values."""

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the whole report as JSON, and write it to ``path`` if given: atomically, or OSError."""
        told = {"format": FORMAT, **plain(self, name_nonfinite=True)}
        if self.quantization is None:  # as it was before there were eight bits
            del told["quantization"]
        text = json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        if path is not None:
            write_text(path, text)
        return text

    @classmethod
    def from_json(cls, text: str) -> FusionReport:
        """Read the output of :meth:`to_json`. ValueError, which gives the reason, for anything else."""
        given = json.loads(text)
        if not isinstance(given, dict) or given.get("format") != FORMAT:
            raise ValueError(f"not a {FORMAT!r}")
        return build(cls, given, "the report", ignore_unknown=True)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """One page that needs no other file, as ``path``: whole or, with OSError, not at all."""
        from gpukern.fusion.report.html import page

        write_text(path, page(self))

    def __rich__(self) -> RenderableType:
        from gpukern.fusion.report.terminal import render

        return render(self)

    def __str__(self) -> str:
        from gpukern.tables import as_text

        return as_text(self)
