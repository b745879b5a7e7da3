"""The look of all pictures, without pyplot: no global state, no window, nothing to close."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpukern.diagnose.extras import needed
from gpukern.runtime.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: What stands out, what it is compared with, a third thing; faint lines behind, words beside.
BLUE, ORANGE, GREEN, FAINT, GREY = "#1f4e9c", "#c2571a", "#2e8b57", "#b8c4d6", "#666666"


def figure(width: float, height: float) -> Figure:
    """An empty figure, in inches. MissingPackage without matplotlib."""
    return needed("matplotlib.figure", "a picture").Figure(figsize=(width, height), layout="constrained")


def panels(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes, a NumPy array [rows, columns]."""
    made = figure(width, height)
    return made, made.subplots(rows, columns, squeeze=False, **options)


def style(axes: Axes) -> None:
    """The look of all curves: little but the curves."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)


def written(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """Write ``figure`` to ``path``, whose folder is made and whose suffix (.png, .svg, .pdf) tells the format."""
    if path is not None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft:
            figure.savefig(draft, dpi=130)
    return figure
