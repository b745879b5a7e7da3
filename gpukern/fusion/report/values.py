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
class QuantizedGroup:
    """A group that multiplies by weights, in a model of eight bits.

    ``precision`` is that of its weights, ``why`` the reason for 16 bits. ``input_scale`` and ``output_scale`` are those
    of tensors stored in eight bits, else None; ``calibration`` is the estimator of the input's. ``snr`` is the output's
    in the whole network, in decibels, ``noise`` the noise of the network's outputs relative to their signal if this
    group alone is in eight bits, where that was measured. ``bytes`` are those that it moves for the example, weights
    included, and ``bytes_before`` those in 16 bits. ``equalized`` and ``corrected``: whether its channels were leveled
    with those of its neighbours, and its bias corrected. ``given_back``: whether it is in 16 bits for the target.
    """

    modules: tuple[str, ...]
    pattern: str
    precision: str
    why: str = ""
    input_scale: float | None = None
    output_scale: float | None = None
    calibration: str = ""
    snr: float | None = None
    noise: float | None = None
    bytes: int = 0
    bytes_before: int = 0
    equalized: bool = False
    corrected: bool = False
    given_back: bool = False


@dataclass(frozen=True)
class Reached:
    """What a model reaches on the batches kept aside: ``value`` is what the target is about, ``snr`` in decibels that
    of the worst output, ``bytes`` what a pass moves for the example, weights included."""

    value: float
    snr: float
    bytes: int


@dataclass(frozen=True)
class Quantization:
    """A model in eight bits. ``format`` is "int8" or "float8_e4m3fn", ``precision`` that of the rest.

    ``metric`` is what ``target`` is about: "agreement" with the original's argmax, or the name of the user's function.
    ``sixteen``, ``every`` and ``reached`` are the model in 16 bits, with all possible groups in eight, and as it is;
    None where nothing was proved. ``observed`` and ``aside``: rows of the batches that ranges were measured on, and
    those of the proof. ``bytes_before`` and ``bytes``: what a pass moves for the example, in 16 bits and as it is.
    """

    format: str
    precision: str
    calibration: str
    metric: str
    target: float
    observed: int
    aside: int
    groups: tuple[QuantizedGroup, ...]
    bytes_before: int
    bytes: int
    sixteen: Reached | None = None
    every: Reached | None = None
    reached: Reached | None = None


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
    quantization: Quantization | None = None

    @property
    def max_error(self) -> float | None:
        """‖y − truth‖ / ‖truth‖ of the model's output; None if verification was off."""
        return None if self.verification is None else self.verification.error
