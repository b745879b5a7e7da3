"""What :func:`gpukern.diagnose.activation_statistics` finds: values, and sentences about them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gpukern.diagnose.distribution import Distribution
from gpukern.formatting import brief

#: Shares of dead units, and of saturated outputs, from which a layer is a finding.
MANY_DEAD, MANY_SATURATED = 0.5, 0.5
#: Ratios of deviations of the last activation to the first.
SHRUNK, GROWN = 0.2, 20.0
#: Outputs of a unit below which a zero for all of them says little.
FEW_OUTPUTS = 8


@dataclass(frozen=True)
class LayerStatistics:
    """A layer, over all its calls. ``kind`` is the name of the activation, or ""; None: does not apply, not computed.

    ``gradient`` is that of the output, ``saturated`` a share of outputs, ``dead`` a share of the ``units``, each of
    which was ``observed`` so many times.
    """

    name: str
    type: str
    kind: str
    calls: int
    output: Distribution
    gradient: Distribution | None = None
    weight_deviation: float | None = None
    weight_gradient: Distribution | None = None
    saturated: float | None = None
    units: int | None = None
    dead: float | None = None
    observed: int = 0


@dataclass(frozen=True)
class ActivationValues:
    """Statistics of the layers in the order of their first calls."""

    model: str
    layers: tuple[LayerStatistics, ...]

    @property
    def activations(self) -> tuple[LayerStatistics, ...]:
        """The activation layers and functions; all layers where there are fewer than two."""
        found = tuple(layer for layer in self.layers if layer.kind)
        return found if len(found) > 1 else self.layers

    @property
    def findings(self) -> tuple[str, ...]:
        """What is wrong, a sentence each."""
        return tuple(_findings(self))


def _findings(report: ActivationValues) -> Iterator[str]:
    for layer in report.layers:
        if layer.output.nonfinite:
            yield f"{layer.name} returns {layer.output.nonfinite:,} values that are NaN or infinite"
        elif layer.gradient is not None and layer.gradient.nonfinite:
            yield f"the gradient of {layer.name} has {layer.gradient.nonfinite:,} values that are NaN or infinite"
        if layer.dead is not None and layer.dead >= MANY_DEAD and layer.observed >= FEW_OUTPUTS:
            yield f"{layer.name}: {100 * layer.dead:.0f} % of the units are dead, zero for every sample"
        if layer.saturated is not None and layer.saturated >= MANY_SATURATED:
            yield f"{layer.name}: {100 * layer.saturated:.0f} % of the outputs are saturated, where the slope is 0"
    yield from _trend(report)


def _trend(report: ActivationValues) -> Iterator[str]:
    first, last = report.activations[0], report.activations[-1]
    before, after = first.output.deviation, last.output.deviation
    if not (before > 0 and math.isfinite(before) and math.isfinite(after)):
        return
    if after < SHRUNK * before:
        yield f"activations shrink: deviation {brief(before)} of {first.name}, {brief(after)} of {last.name}"
    elif after > GROWN * before:
        yield f"activations grow: deviation {brief(before)} of {first.name}, {brief(after)} of {last.name}"
