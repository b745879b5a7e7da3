"""A made-up clock, and problems that run in no time."""

from __future__ import annotations

from pathlib import Path

from gpukern.conv import database, planner
from gpukern.conv.plan import ConvPlan, Direction
from gpukern.runtime.current_device import device_spec
from gpukern.tune import measurement, sources
from gpukern.tune.record import Call
from gpukern.tune.session import tune_calls

#: Two problems that run in no time.
LAYERS = ("1x16x4x4 16x1x1", "2x16x4x4 16x3x3 --padding 1")


def call_of(words: str = LAYERS[1], kind: str = "float16", direction: Direction = Direction.FORWARD) -> Call:
    (call,) = sources.calls_of_layer(sources.layer_called(words), kind, True, [direction])
    return call


def plans_of(call: Call, device) -> list[ConvPlan]:
    """Those that are tried and can run here, the planner's choice first."""
    spec = device_spec(device)
    ranked = planner.ranking(call.problem, call.direction, call.operands, spec)
    heuristic = planner.heuristic_plan(call.problem, call.direction, call.operands, spec)
    tried = [plan for plan in measurement.worth_trying(ranked, heuristic) if not planner.only_measured(plan)]
    return sorted(tried, key=lambda plan: plan != heuristic)


class Clock:
    """Every plan takes 10 µs, but for those that the test knows better. Remembers what it timed."""

    def __init__(self, microseconds: dict[ConvPlan, float] | None = None) -> None:
        self.microseconds = microseconds or {}
        self.timed: list[ConvPlan] = []

    def __call__(self, candidate: measurement.Candidate) -> float:
        if candidate.plan not in self.timed:  # once shows that it can be called; the interpreter is slow
            candidate()
        self.timed.append(candidate.plan)
        return 1e-6 * self.microseconds.get(candidate.plan, 10.0)


def quietly(calls, device, timer, **options):
    return tune_calls(calls, device, timer=timer, progress=False, **options)


def entries(folder: Path, device) -> dict[str, database.Entry]:
    return database.read(folder / database.file_name(device_spec(device).name))
