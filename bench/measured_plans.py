"""Plans of convolutions that were measured: what the suite ``plans`` left, as problems and plans again."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from bench import results
from bench.results import Results, ResultsError, Row
from gpukern.conv import ConvPlan, ConvProblem, Direction, Operands, Variant, conv_problem
from gpukern.explain.formatting import OPERANDS
from gpukern.explain.query import convolution
from gpukern.runtime.device import DEVICES, DeviceSpec

T = TypeVar("T")

_PLAN = re.compile(
    r"(?P<variant>[a-z0-9 ]+) (?P<m>\d+)×(?P<n>\d+)×(?P<k>\d+)(?: \(box (?P<box>[\d×]+)\))?, (?P<warps>\d+) warps"
    r"(?:, (?P<stages>\d+) stages)?(?:, (?P<splits>\d+) splits)?(?:, (?P<precision>tf32x3|tf32))?"
    r"(?:, (?P<copied>[a-z ]+) copied)?"
)


@dataclass(frozen=True)
class Measured:
    """One problem on one device, and the seconds of each plan: the median of its samples, the call's own plan first."""

    problem: ConvProblem
    direction: Direction
    operands: Operands
    device: DeviceSpec
    seconds: dict[ConvPlan, float]
    row: Row
    environment: results.Environment

    @property
    def best(self) -> ConvPlan:
        return min(self.seconds, key=self.seconds.__getitem__)


def read(path: Path) -> list[Measured]:
    """Every row of a results file whose plans were timed. ResultsError if it holds none, or its device has no peaks."""
    found = results.read(path)
    rows = list(_measured(found))
    if not rows:
        raise ResultsError(f"{path} has no measured plans: python -m bench plans makes them, on a GPU")
    return rows


def device_of(environment: results.Environment) -> DeviceSpec:
    """The named device that was measured on; ResultsError for another, whose peaks are not listed."""
    # A GH200 is no H200, though the one name is in the other.
    named = [device for device in DEVICES.values() if device.name.lower() in environment.device.lower()]
    if named:
        return max(named, key=lambda device: len(device.name))
    raise ResultsError(f"the peaks of {environment.device} are not known: add it to gpukern/runtime/device.py")


def _three(values: Iterable[T]) -> tuple[T, T, T]:
    a, b, c = values
    return a, b, c


def plan_called(words: str, direction: Direction) -> ConvPlan:
    """The inverse of :func:`gpukern.explain.formatting.describe_plan`; ValueError for other words."""
    found = _PLAN.fullmatch(words)
    if found is None:
        raise ValueError(f"{words!r} describes no plan")
    copied = (found["copied"] or "").split(" and ")
    return ConvPlan(
        Variant(found["variant"]),
        int(found["m"]),
        int(found["n"]),
        int(found["k"]),
        int(found["warps"]),
        num_stages=int(found["stages"] or 1),
        splits=int(found["splits"] or 1),
        box=_three(map(int, found["box"].split("×"))) if found["box"] else None,
        pack=_three(name in copied for name in OPERANDS[direction]),
        precision=found["precision"] or "ieee",
    )


def _measured(found: Results) -> Iterator[Measured]:
    device = device_of(found.environment)
    for row in found.rows:
        if row.case.suite != "plans":
            continue
        direction = Direction(row.case.computation)
        seconds = {}
        for candidate in row.candidates:
            if samples := candidate.samples.get("graph"):
                plan = plan_called(candidate.name.removeprefix("gpukern "), direction)
                seconds[plan] = 1e-6 * statistics.median(samples)
        if seconds:
            problem = _problem(row.case.sizes)
            question = convolution(problem, direction, row.case.dtype, row.case.layout == "channels_last", device)
            yield Measured(problem, direction, question.operands, device, seconds, row, found.environment)


def _problem(sizes: dict) -> ConvProblem:
    vertical, horizontal = sizes["padding"]
    return conv_problem(
        tuple(sizes[name] for name in "NCHW"),
        (sizes["K"], sizes["C"] // sizes["groups"], sizes["R"], sizes["S"]),
        None,
        tuple(sizes["stride"]),
        (vertical, vertical, horizontal, horizontal),
        tuple(sizes["dilation"]),
        sizes["groups"],
    )
