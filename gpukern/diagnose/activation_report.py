"""The result of :func:`gpukern.diagnose.activation_statistics`, and its forms: table, picture, JSON."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpukern.diagnose.activation_values import ActivationValues
from gpukern.runtime.files import write_text
from gpukern.runtime.records import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


@dataclass(frozen=True)
class ActivationReport(ActivationValues):
    """Statistics of layers. ``str()`` and rich print a table."""

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the deviations of all layers, and histograms of some; write the picture to ``path`` if given."""
        from gpukern.diagnose.activation_picture import draw
        from gpukern.diagnose.figures import written

        return written(draw(self), path)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return all values as JSON, and write them to ``path`` if given: atomically, or OSError."""
        told = {**plain(self, name_nonfinite=True), "findings": list(self.findings)}
        text = json.dumps(told, ensure_ascii=False, allow_nan=False) + "\n"
        if path is not None:
            write_text(path, text)
        return text

    def __rich__(self) -> Table:
        from gpukern.diagnose.activation_table import render

        return render(self)

    def __str__(self) -> str:
        from gpukern.tables import as_text

        return as_text(self)
