"""What a fusion did, as values: see ``render`` for the terminal, ``page`` for HTML."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from gpukern.runtime.files import write_text
from gpukern.runtime.records import build, plain

if TYPE_CHECKING:
    from rich.console import RenderableType

#: Of the JSON; changed whenever the meaning of a field changes.
FORMAT = "gpukern fusion report, version 1"
#: Its name inside a saved model.
IN_ARCHIVE = "gpukern_report.json"


class NotFused(NamedTuple):
    """Something that stayed as it was: the module's path (or the graph node's name), and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class FusedGroup:
    """Nodes of the captured graph that became one.

    ``modules`` are paths in the model, in the order of the computation; a module that is called twice is in two groups.
    ``pattern`` says what was computed, as "conv2d + batch_norm + add + relu", and ``operator`` what computes it now:
    "gpukern::conv2d", or "aten::convolution" where only the weights were folded. ``dtype`` is the group's own, ``note``
    why it differs from the model's. ``plan`` is the kernel's, for the example's shapes on the model's device; "" where
    the kernel has none. Seconds and bytes are those of the roofline; None where nothing is known of the device.
    ``error`` is ‖y − truth‖ / ‖truth‖ of the group's output in the verification.
    """

    modules: tuple[str, ...]
    pattern: str
    operator: str
    dtype: str
    note: str = ""
    plan: str = ""
    bytes: int | None = None
    floor: float | None = None
    expected: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class GraphNode:
    """Of the picture: a node's name, what stands in it, the index of its group in ``fused`` or None, its inputs."""

    name: str
    label: str
    group: int | None
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Totals:
    """Of one forward pass for the example: operators that compute, elements of parameters, bytes of activations.

    Activations are what operators read and write, the model's input and output with them; constants are not counted.
    """

    operators: int
    parameters: int
    activation_bytes: int


@dataclass(frozen=True)
class Timing:
    """On a GPU: seconds of a forward pass in the median and the worst of a hundred, images a second, bytes at most.

    ``kernels`` are those that a pass launches, None where the profiler sees none.
    """

    median: float
    p99: float
    images_per_second: float
    peak_memory: int
    kernels: int | None = None


@dataclass(frozen=True)
class Verification:
    """The fused model beside the unfused one in the same dtype, both as ‖y − truth‖ / ‖truth‖.

    ``truth`` is the dtype in which the original was run for the truth. ``error`` may be ``factor`` times ``unfused``
    plus ``floor``. ``argmax_agreement`` is the share of rows whose largest element is where the truth's is, None for
    outputs without rows. ``wrong`` says which group goes wrong where all are given the original's own values; "": none.
    """

    truth: str
    error: float
    unfused: float
    factor: float
    floor: float
    argmax_agreement: float | None
    wrong: str = ""

    @property
    def bound(self) -> float:
        return self.factor * self.unfused + self.floor

    @property
    def passed(self) -> bool:
        return self.error <= self.bound and not self.wrong  # a NaN does not


@dataclass(frozen=True)
class FusionReport:
    """What :func:`gpukern.fuse` did. ``environment`` names versions and device."""

    model: str
    dtype: str
    fused: tuple[FusedGroup, ...]
    not_fused: tuple[NotFused, ...]
    before: Totals
    after: Totals
    graph_before: tuple[GraphNode, ...]
    graph_after: tuple[GraphNode, ...]
    verification: Verification | None = None
    timing_before: Timing | None = None
    timing_after: Timing | None = None
    notes: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def max_error(self) -> float | None:
        """‖y − truth‖ / ‖truth‖ of the model's output; None where verification was not asked for."""
        return None if self.verification is None else self.verification.error

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """All of it as JSON, also written to ``path``: whole or, with OSError, not at all."""
        told = {"format": FORMAT, **plain(self, name_nonfinite=True)}
        text = json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        if path is not None:
            write_text(path, text)
        return text

    @classmethod
    def from_json(cls, text: str) -> FusionReport:
        """What :meth:`to_json` wrote. ValueError, saying what is wrong, for anything else."""
        given = json.loads(text)
        if not isinstance(given, dict) or given.get("format") != FORMAT:
            raise ValueError(f"not a {FORMAT!r}")
        return build(cls, given, "the report", ignore_unknown=True)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """One page that needs no other file, as ``path``: whole or, with OSError, not at all."""
        from gpukern.fusion.page import page

        write_text(path, page(self))

    def __rich__(self) -> RenderableType:
        from gpukern.fusion.render import render

        return render(self)

    def __str__(self) -> str:
        from gpukern.fusion.render import as_text

        return as_text(self)
