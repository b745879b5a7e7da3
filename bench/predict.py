"""The plan of a case on a device that need not be here, beside the time that no implementation can beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bench.results import Prediction
from bench.suite import Task
from gpukern.conv import ConvProblem, Direction
from gpukern.explain.formatting import describe_plan
from gpukern.explain.query import Epilogue, Question, convolution, linear
from gpukern.explain.ranking import answer
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.roofline import Cost, Work, floor


def predict_convolution(
    task: Task,
    p: ConvProblem,
    direction: Direction,
    device: DeviceSpec,
    epilogue: Epilogue = Epilogue(),  # noqa: B008 - immutable
) -> Prediction:
    """Of one of gpukern's launches for a convolution, or for a linear layer seen as one."""
    found = answer(replace(asked(task, p, direction, device), epilogue=epilogue))
    chosen = found.chosen
    return prediction(task, describe_plan(chosen.plan, found.question.direction), chosen.cost, found.work, device)


def asked(task: Task, p: ConvProblem, direction: Direction, device: DeviceSpec) -> Question:
    """The launch that the case makes: images in its layout, or matrices, which have none."""
    case = task.case
    if not case.layout:
        return linear(p.N, p.C, p.K, direction, case.dtype, device)
    return convolution(p, direction, case.dtype, case.layout == "channels_last", device)


def prediction(task: Task, plan: str, costs: Cost, must: Work, device: DeviceSpec) -> Prediction:
    """``costs`` of the plan, beside what any implementation ``must`` do."""
    least = floor(must, device.peaks)
    return Prediction(
        case=task.case,
        plan=plan,
        launches=costs.launches,
        tiles=costs.tiles,
        waves=costs.waves,
        efficiency=costs.efficiency,
        flops=must.flops,
        moved=costs.bytes,
        bytes=must.bytes,
        predicted_us=costs.seconds * 1e6,
        floor_us=least.seconds * 1e6,
        bound=least.bound,
    )


def total(task: Task, plan: str, parts: Sequence[tuple[int, Prediction]]) -> Prediction:
    """Of a network that consists of ``parts``, (how many of them, each one's prediction), run one by one."""

    def sum_of(name: str) -> float:
        return sum(count * getattr(part, name) for count, part in parts)

    memory = sum(count * part.floor_us for count, part in parts if part.bound == "memory")
    return Prediction(
        case=task.case,
        plan=plan,
        launches=sum_of("launches"),
        tiles=sum_of("tiles"),
        waves=sum_of("waves"),
        efficiency=sum_of("flops") / sum(count * part.flops / part.efficiency for count, part in parts),
        flops=sum_of("flops"),
        moved=sum_of("moved"),
        bytes=sum_of("bytes"),
        predicted_us=sum_of("predicted_us"),
        floor_us=sum_of("floor_us"),
        bound="memory" if memory > sum_of("floor_us") / 2 else "compute",
    )
