"""The values that a report of a check is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

#: Who computes.
OURS, TORCH = "gpukern", "torch"


@dataclass(frozen=True)
class Error:
    """Relative ``error`` of a tensor, ‖y − ref‖ / ‖ref‖, and its ``share`` of the bound, which over one leaves.

    None where it was not computed, infinite where something is not finite or was refused."""

    error: float | None = None
    share: float | None = None

    @property
    def left(self) -> bool:
        """Whether the bound is left."""
        return self.share is not None and not self.share <= 1


@dataclass(frozen=True)
class TensorCheck:
    """A tensor of a layer, ``alone`` and ``in_model``, by gpukern and by torch. Of several calls the worst."""

    name: str
    alone: Error
    alone_torch: Error
    in_model: Error
    in_model_torch: Error


@dataclass(frozen=True)
class LayerCheck:
    """A layer, or neighbours that gpukern computes as one. ``reason``: why torch computes it in both, "" elsewhere.

    ``note``: what either raised. ``calls``: how often the model calls it; 0 for parameters of no layer.
    """

    name: str
    type: str
    reason: str
    calls: int
    tensors: tuple[TensorCheck, ...]
    note: str = ""

    def worst(self, place: str, *names: str) -> Error:
        """The error with the largest share among the tensors called so; all, without names. ``place`` is a field."""
        found = [getattr(each, place) for each in self.tensors if not names or each.name in names]
        known = [error for error in found if error.share is not None]
        return max(known, key=lambda error: error.share, default=Error())


class Finding(NamedTuple):
    """A bound that is left: by which layer, with which tensor, in whose computation, alone or in the model."""

    layer: str
    tensor: str
    by: str
    alone: bool
    error: float
    share: float

    def __str__(self) -> str:
        where = "alone" if self.alone else "in the model"
        times = f"{self.share:.3g} times its bound" if math.isfinite(self.share) else "not finite, or not computed"
        return f"{self.layer}: {self.tensor} by {self.by}, {where}: error {self.error:.1e}, {times}"


def _left(layer: LayerCheck, by: str, place: str) -> Iterator[Finding]:
    for tensor in layer.tensors:
        error: Error = getattr(tensor, place)
        if error.left:
            value, share = (math.inf if each is None else each for each in (error.error, error.share))
            yield Finding(layer.name, tensor.name, by, place.startswith("alone"), value, share)


def _is_gradient(finding: Finding) -> bool:
    return finding.tensor.endswith("gradient")


@dataclass(frozen=True)
class ReportValues:
    """What :class:`~gpukern.checking.report.CheckReport` holds."""

    model: str
    device: str
    #: how gpukern's layers were computed: kernels, emulated or reference
    mode: str
    dtype: str
    channels_last: bool
    training: bool
    seed: int
    layers: tuple[LayerCheck, ...]
    notes: tuple[str, ...] = ()
    environment: dict[str, str] | None = None

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What leaves its bound: layers alone; where all of one computation keep that, where the error in the model
        first leaves it, since all layers after it, and for gradients all before it, err with it."""
        found: list[Finding] = []
        for by, alone, in_model in ((OURS, "alone", "in_model"), (TORCH, "alone_torch", "in_model_torch")):
            left = [(layer, each) for layer in self.layers for each in _left(layer, by, alone)]
            # Layers that torch computes are in both, and reported as torch's.
            found += [each for layer, each in left if by == TORCH or not layer.reason]
            found += [] if left else self._first(by, in_model)
        return tuple(found)

    def _first(self, by: str, place: str) -> list[Finding]:
        left = [(layer, [*_left(layer, by, place)]) for layer in self.layers]
        for _, found in left:
            outputs = [each for each in found if each.tensor.startswith("output") and not _is_gradient(each)]
            if outputs:
                return outputs[:1]
        for _, found in reversed(left):
            if found:
                return found
        return []

    @property
    def passed(self) -> bool:
        """Whether every layer keeps its bounds, in both computations."""
        return not self.findings
