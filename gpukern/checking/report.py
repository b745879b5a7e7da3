"""The report of a check: its values, and its forms."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from gpukern.runtime.files import write_text
from gpukern.runtime.records import build, plain

if TYPE_CHECKING:
    from rich.console import RenderableType

#: The name of the JSON's form, another one whenever the meaning of a field changes.
FORMAT = "gpukern check report, version 1"
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
class CheckReport:
    """Report of :func:`gpukern.check`. ``str()`` and rich print it."""

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

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the whole report as JSON, and write it to ``path`` if given: atomically, or OSError."""
        told = {"format": FORMAT, "passed": self.passed, **plain(self, name_nonfinite=True)}
        told["findings"] = plain(self.findings, name_nonfinite=True)
        text = json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        if path is not None:
            write_text(path, text)
        return text

    @classmethod
    def from_json(cls, text: str) -> CheckReport:
        """Read the output of :meth:`to_json`. ValueError, which gives the reason, for anything else."""
        given = json.loads(text)
        if not isinstance(given, dict) or given.get("format") != FORMAT:
            raise ValueError(f"not a {FORMAT!r}")
        return build(cls, given, "the report", ignore_unknown=True)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """One page that needs no other file, as ``path``: whole or, with OSError, not at all."""
        from gpukern.checking.html import page

        write_text(path, page(self))

    def __rich__(self) -> RenderableType:
        from gpukern.checking.terminal import render

        return render(self)

    def __str__(self) -> str:
        from gpukern.tables import as_text

        return as_text(self)
