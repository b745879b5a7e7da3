"""Values of a fusion report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class NotFused(NamedTuple):
    """Something that stayed as it was: the module's path (or the graph node's name), and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class FusedGroup:
    """Nodes of the captured graph that became one.

    ``modules`` are paths in the model, in the order of the computation; a module that is called twice is in two groups.
    ``pattern`` names what was computed, as "conv2d + batch_norm + add + relu", and ``operator`` what computes it now:
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
    """A node of the picture: its name, its text, the index of its group in ``fused`` or None, its inputs."""

    name: str
    label: str
    group: int | None
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Totals:
    """Totals of a forward pass for the example: operators that compute, elements of parameters, bytes of activations.

    Activations are tensors that operators read and write, with the model's input and output; constants do not count.
    """

    operators: int
    parameters: int
    activation_bytes: int


@dataclass(frozen=True)
class Timing:
    """Timing on a GPU: median and worst seconds of a hundred forward passes, images a second, peak bytes.

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
    outputs without rows. ``wrong`` names the group that is wrong if all are given the original's own values; "": none.
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
class ReportValues:
    """Values of a report of :func:`gpukern.fuse`, without its forms. ``environment`` names versions and device."""

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
        """‖y − truth‖ / ‖truth‖ of the model's output; None if verification was off."""
        return None if self.verification is None else self.verification.error
