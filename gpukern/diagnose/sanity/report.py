"""The report of :func:`gpukern.diagnose.sanity_check`: a table, JSON, a picture."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpukern.diagnose.sanity.values import SanityValues
from gpukern.runtime.files import write_text
from gpukern.runtime.records import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType


@dataclass(frozen=True)
class SanityReport(SanityValues):
    """Verdicts of all checks. ``str()`` and rich print a table."""

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return all checks and numbers as JSON, and write them to ``path`` if given: atomically, or OSError."""
        told = {"passed": self.passed, **plain(self, name_nonfinite=True)}
        text = json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        if path is not None:
            write_text(path, text)
        return text

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw how a handful was learned, the updates and the derivatives; write the picture to ``path`` if given."""
        from gpukern.diagnose.figures import written
        from gpukern.diagnose.sanity.picture import draw

        return written(draw(self), path)

    def __rich__(self) -> RenderableType:
        from gpukern.diagnose.sanity.table import render

        return render(self)

    def __str__(self) -> str:
        from gpukern.tables import as_text

        return as_text(self)
