"""The result of :func:`gpukern.diagnose.search`: a table of the best runs, JSON, a picture of all."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpukern.diagnose.search_values import SearchValues
from gpukern.formatting import brief, count
from gpukern.runtime.files import write_text
from gpukern.runtime.records import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

#: Runs in the table.
_LISTED = 10


@dataclass(frozen=True)
class SearchReport(SearchValues):
    """All runs of a search. ``str()`` and rich print a table of the best."""

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw all runs as lines through their settings, and the value by each; write it to ``path`` if given."""
        from gpukern.diagnose.figures import written
        from gpukern.diagnose.search_picture import draw

        return written(draw(self), path)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return all runs as JSON, and write them to ``path`` if given: atomically, or OSError."""
        told = {**plain(self, name_nonfinite=True), "warnings": list(self.warnings)}
        text = json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        if path is not None:
            write_text(path, text)
        return text

    def __rich__(self) -> Table:
        from gpukern import tables

        states = [run.state for run in self.runs]
        title = f"{count(len(states), 'run')}, {states.count('pruned')} ended early, {states.count('failed')} failed"
        columns = tables.numbers("run", "round", "value", *self.space)
        made = tables.table(*columns, title=title, caption="\n".join(self.warnings))
        for run in self.ranked[:_LISTED]:
            settings = (_told(run.settings[name]) for name in self.space)
            made.add_row(str(run.number), str(run.round), f"{run.value:.4g}", *settings)
        return made

    def __str__(self) -> str:
        from gpukern.tables import as_text

        return as_text(self)


def _told(value: object) -> str:
    return brief(value) if isinstance(value, float) else str(value)
