"""Activation statistics as a table, for a terminal and as plain text."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from gpukern import tables
from gpukern.diagnose.activation_values import ActivationValues
from gpukern.diagnose.distribution import Distribution
from gpukern.formatting import brief, percent

_COLUMNS = ("mean", "deviation", "zeros", "saturated", "dead units")
_GRADIENTS = ("gradient's mean", "gradient's deviation", "weight's deviation", "its gradient's")


def render(report: ActivationValues) -> Table:
    """A row for each layer; columns of gradients where there are any, findings below."""
    with_gradients = any(layer.gradient or layer.weight_gradient for layer in report.layers)
    columns = tables.numbers(*_COLUMNS, *(_GRADIENTS if with_gradients else ()))
    made = tables.table("layer", "type", *columns, title=report.model, caption="\n".join(report.findings), narrow=True)
    for layer in report.layers:
        cells = [layer.name, layer.type, *_two(layer.output), percent(layer.output.zeros) if layer.output.zeros else ""]
        cells += ["" if share is None else percent(share, 1) for share in (layer.saturated, layer.dead)]
        if with_gradients:
            weight = "" if layer.weight_deviation is None else brief(layer.weight_deviation)
            cells += [*_two(layer.gradient), weight, _two(layer.weight_gradient)[1]]
        made.add_row(*map(Text, cells))
    return made


def _two(values: Distribution | None) -> tuple[str, str]:
    return ("", "") if values is None else (brief(values.mean), brief(values.deviation))
