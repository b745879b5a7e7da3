"""Words and columns of every form of a report."""

from __future__ import annotations

import math
from typing import NamedTuple

from gpukern.checking.values import OURS, TORCH, Error, LayerCheck, ReportValues
from gpukern.formatting import MISSING, count, percent


class Cell(NamedTuple):
    text: str
    left: bool


#: Field of a :class:`TensorCheck`, and whether its gradients are meant: what the columns show, ours and torch's.
COLUMNS = tuple(
    (f"{what} {where}, {by}", f"{field}{suffix}", gradients)
    for field, where in (("alone", "alone"), ("in_model", "in model"))
    for what, gradients in (("output", False), ("gradients", True))
    for suffix, by in (("", "gpukern"), ("_torch", "torch"))
)


def cells(layer: LayerCheck) -> list[Cell]:
    """The largest share of its bound, in each of :data:`COLUMNS`."""
    return [_cell(layer, field, worst(layer, field, gradients)) for _, field, gradients in COLUMNS]


def worst(layer: LayerCheck, field: str, gradients: bool) -> Error:
    """The error in ``field`` with the largest share, of the gradients or of all else."""
    return layer.worst(field, *(each.name for each in layer.tensors if (" gradient" in each.name) is gradients))


def _cell(layer: LayerCheck, field: str, error: Error) -> Cell:
    if field == "alone" and layer.reason:
        return Cell("", False)  # torch's own, once more
    return Cell(share(error), error.left)


def share(error: Error) -> str:
    """Format an error in shares of its bound."""
    if error.share is None:
        return MISSING
    if not math.isfinite(error.share):
        return "✗ not finite"
    rounded = percent(error.share) if error.share >= 0.01 or error.share == 0 else "<1%"
    return f"✗ {rounded}" if error.left else rounded


def headline(report: ReportValues) -> str:
    """One line: who leaves a bound, and what was compared."""
    layout = ", channels_last" if report.channels_last else ""
    mode = "training" if report.training else "evaluation"
    how = f"{report.model} in {report.dtype}{layout}, {mode} mode, on {report.device}, gpukern {report.mode}"
    found = {by: len({each.layer for each in report.findings if each.by == by}) for by in (OURS, TORCH)}
    if any(found.values()):
        whose = ", ".join(f"{number} by {by}" for by, number in found.items())
        layers = len({each.layer for each in report.findings})
        return f"{how}: {count(layers, 'layer leaves its bound', 'layers leave their bounds')}, {whose}"
    return f"{how}: {count(len(report.layers), 'layer')}, all within their bounds"
