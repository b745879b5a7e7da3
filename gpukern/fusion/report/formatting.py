"""Formatting of numbers, names and comparisons in every form of a report."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gpukern.formatting import MISSING, count, error, micro, milli, number, percent, ratio, size
from gpukern.fusion.report.values import FusedGroup, Quantization, QuantizedGroup, Reached, ReportValues, Verification


class Line(NamedTuple):
    """A line of the before/after table. ``gain``: how many times as good, or another remark."""

    name: str
    before: str
    after: str
    gain: str


def clean(text: str) -> str:
    """Names come from files too: nothing that steers a terminal, or that HTML does not take."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def agreement(share: float | None) -> str:
    """The share of rows with the truth's argmax."""
    return percent(share, 1)


def times(more: float, less: float) -> str:
    return ratio(more / less) if less else ""


def allowed(verification: Verification) -> str:
    bound = verification.bound
    return f"{error(bound)} allowed: {verification.factor:g} × unfused + {error(verification.floor)}"


def comparison(report: ReportValues) -> list[Line]:
    """Return the lines that compare the model before and after, the most informative first."""
    before, after = report.before, report.after
    lines = [
        _counted("operators per forward", before.operators, after.operators),
        Line(
            "activations moved per forward",
            size(before.activation_bytes),
            size(after.activation_bytes),
            times(before.activation_bytes, after.activation_bytes),
        ),
        _counted("parameters", before.parameters, after.parameters),
    ]
    if check := report.verification:
        lines.append(
            Line(
                f"error against {check.truth}{where(report)}", error(check.unfused), error(check.error), allowed(check)
            )
        )
        if check.argmax_agreement is not None:
            lines.append(
                Line(f"rows with the truth's argmax{where(report)}", MISSING, agreement(check.argmax_agreement), "")
            )
    return [*lines[:1], *_kernels(report), *lines[1:], *_timings(report)]


def where(report: ReportValues) -> str:
    """What a verification is of, in a report of eight bits."""
    return "" if report.quantization is None else f", in {report.quantization.precision}"


def _counted(name: str, before: int, after: int) -> Line:
    return Line(name, f"{before:,}", f"{after:,}", times(before, after))


def _kernels(report: ReportValues) -> list[Line]:
    before, after = (timing and timing.kernels for timing in (report.timing_before, report.timing_after))
    return [_counted("kernels launched per forward", before, after)] if before and after else []


def _timings(report: ReportValues) -> list[Line]:
    before, after = report.timing_before, report.timing_after
    if before is None or after is None:
        return []
    return [
        Line("latency, median", milli(before.median), milli(after.median), times(before.median, after.median)),
        Line("latency, p99", milli(before.p99), milli(after.p99), times(before.p99, after.p99)),
        Line(
            "images per second",
            number(before.images_per_second, 4),
            number(after.images_per_second, 4),
            times(after.images_per_second, before.images_per_second),
        ),
        Line(
            "peak memory",
            size(before.peak_memory),
            size(after.peak_memory),
            times(before.peak_memory, after.peak_memory),
        ),
    ]


def modules(names: Sequence[str]) -> str:
    """ "layer1.0: conv1, bn1, relu": what all have in common once."""
    parts = [clean(name).split(".") for name in names]
    shared = 0
    if len(parts) > 1:
        levels = zip(*(part[:-1] for part in parts), strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda level: len(set(level)) == 1, levels))
    listed = ", ".join(".".join(part[shared:]) or "(the model)" for part in parts)
    return f"{'.'.join(parts[0][:shared])}: {listed}" if shared else listed


def reasons(report: ReportValues) -> dict[str, list[str]]:
    """Why something was not fused → the names of all it holds for; the most frequent first."""
    grouped: dict[str, list[str]] = {}
    for name, reason in report.not_fused:
        grouped.setdefault(clean(reason), []).append(clean(name) or "(the model)")
    return dict(sorted(grouped.items(), key=lambda item: -len(item[1])))


class Column(NamedTuple):
    """A column of the table of groups; ``numbers``: whether it holds numbers."""

    name: str
    numbers: bool
    cell: Callable[[FusedGroup], str]


def _columns(report: ReportValues) -> tuple[Column, ...]:
    return (
        Column("modules", False, lambda group: modules(group.modules)),
        Column("pattern", False, lambda group: clean(group.pattern)),
        Column("operator", False, lambda group: clean(group.operator)),
        Column("dtype", False, lambda group: _dtype(group, report)),
        Column("plan", False, lambda group: clean(group.plan) or MISSING),
        Column("error", True, lambda group: error(group.error)),
        Column("bytes", True, lambda group: size(group.bytes)),
        Column("floor", True, lambda group: micro(group.floor)),
        Column("expected", True, lambda group: micro(group.expected)),
    )


def _dtype(group: FusedGroup, report: ReportValues) -> str:
    """Format a group's dtype where it is not the model's or they are mixed by intent, and the reason."""
    if group.note:
        return clean(f"{group.dtype}: {group.note}")
    return MISSING if group.dtype == report.dtype and report.quantization is None else clean(group.dtype)


def columns(report: ReportValues) -> list[Column]:
    """Return the columns for which some group of the report has a value."""
    return [column for column in _columns(report) if any(column.cell(group) != MISSING for group in report.fused)]


def in_eight_bits(told: Quantization) -> list[Line]:
    """Return the lines that compare 16 bits with the groups in eight, all that can be and those that are."""
    every = told.every
    lines = [
        Line(
            "bytes per forward, with weights",
            size(told.bytes_before),
            size(every.bytes) if every else MISSING,
            size(told.bytes),
        ),
        Line("groups in 8 bits", "0", str(_possible(told)), str(_kept(told))),
    ]
    steps = (told.sixteen, told.every, told.reached)
    if told.sixteen and told.every and told.reached:
        told_by = [reached(told, step) for step in steps if step]
        lines.append(Line(f"{told_by[0][0]}, target {told.target:g}", *(value for _, value in told_by)))
        lines.append(Line("signal-to-noise of the outputs", *(decibels(step.snr) for step in steps if step)))
    return lines


def reached(told: Quantization, step: Reached) -> tuple[str, str]:
    """Return what the target is about, and that value of one of the three models."""
    if told.metric == "agreement":
        return "agreement with the original", agreement(step.value)
    return clean(told.metric), number(step.value, 4)


def _kept(told: Quantization) -> int:
    return sum(group.precision == told.format for group in told.groups)


def _possible(told: Quantization) -> int:
    return sum(group.precision == told.format or group.given_back for group in told.groups)


def decibels(snr: float | None) -> str:
    """A signal-to-noise ratio; "exact" where there is no noise."""
    if snr is None:
        return MISSING
    return f"{snr:.1f} dB" if math.isfinite(snr) else "exact" if snr > 0 else "none"


def _scale(scale: float | None) -> str:
    return MISSING if scale is None else f"{scale:.3g}"


def _made(group: QuantizedGroup) -> str:
    """How a group was calibrated, or why it is in 16 bits."""
    did = [
        clean(group.calibration),
        *(["equalized"] if group.equalized else []),
        *(["bias corrected"] if group.corrected else []),
    ]
    return "; ".join(filter(None, (", ".join(filter(None, did)), clean(group.why))))


class QuantizedColumn(NamedTuple):
    """A column of the table of groups in eight bits; ``numbers``: whether it holds numbers."""

    name: str
    numbers: bool
    cell: Callable[[QuantizedGroup], str]


_QUANTIZED = (
    QuantizedColumn("modules", False, lambda group: modules(group.modules)),
    QuantizedColumn("pattern", False, lambda group: clean(group.pattern)),
    QuantizedColumn("weights", False, lambda group: clean(group.precision)),
    QuantizedColumn("input scale", True, lambda group: _scale(group.input_scale)),
    QuantizedColumn("output scale", True, lambda group: _scale(group.output_scale)),
    QuantizedColumn("SNR", True, lambda group: decibels(group.snr)),
    QuantizedColumn("noise alone", True, lambda group: error(group.noise)),
    QuantizedColumn("bytes", True, lambda group: size(group.bytes)),
    QuantizedColumn("of 16 bits", True, lambda group: percent(_share_of(group), 0)),
    QuantizedColumn("calibration", False, _made),
)


def _share_of(group: QuantizedGroup) -> float | None:
    return group.bytes / group.bytes_before if group.bytes_before else None


def quantized_columns(told: Quantization) -> list[QuantizedColumn]:
    """Return the columns for which some group has a value."""
    return [column for column in _QUANTIZED if any(column.cell(group) not in ("", MISSING) for group in told.groups)]


def headline(report: ReportValues) -> str:
    """One line: how much was fused, how much was not."""
    fused, left = count(len(report.fused), "group"), len(report.not_fused)
    failed = "the verification FAILED; " if report.verification and not report.verification.passed else ""
    told = report.quantization
    kind = report.dtype if told is None else f"{told.format} and {told.precision}"
    eight = "" if told is None else f"{_kept(told)} of {count(len(told.groups), 'product')} in 8 bits, "
    return f"{clean(report.model)} in {kind}: {failed}{eight}{fused} fused, {left or 'nothing'} left as it was"
