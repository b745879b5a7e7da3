"""The convolution's plan against other plans for the same launch: to find better entries for a plan database."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from bench.suite import Implementation, Task, register
from bench.suites.conv import Convolutions
from gpukern import conv  # conv.run needs Triton, which looking at plans does not
from gpukern.conv import ConvPlan, ConvProblem, Direction, family_of, is_elementwise, ranking
from gpukern.explain.formatting import describe_plan
from gpukern.explain.query import Question, convolution
from gpukern.explain.ranking import chosen
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.mode import EMULATE


class Plans(Convolutions):
    """The candidates are gpukern's own kernels under other plans; the first is the plan that a call would get."""

    name = "plans"
    title = "Plans of convolutions"

    def implementations(
        self, task: Task[ConvProblem], peers: Sequence[str], device: torch.device
    ) -> list[Implementation]:
        question = question_of(task, device_spec(device))
        return [
            Implementation(
                f"gpukern {describe_plan(each, question.direction)}",
                task.case.layout,
                with_plan(question, each),
                missing=_missing(each, device),
            )
            for each in plans(question)
        ]


def question_of(task: Task[ConvProblem], device: DeviceSpec) -> Question:
    """The launch that the case makes."""
    case = task.case
    return convolution(task.problem, Direction(case.computation), case.dtype, case.layout == "channels_last", device)


def plans(question: Question) -> list[ConvPlan]:
    """Return all plans worth trying, each once: a call's own, every kernel's, and neighbours of implicit GEMM's."""
    choice, _ = chosen(question)
    ranked = [each.plan for each in ranking(question.problem, question.direction, question.operands, question.device)]
    pointers = next((each for each in ranked if family_of(each).any_tile), None)
    neighbours = _neighbours(pointers, question.direction) if pointers else ()
    return list(dict.fromkeys((choice, *ranked, *neighbours)))


def _neighbours(of: ConvPlan, direction: Direction) -> Iterator[ConvPlan]:
    """One thing changed at a time, and larger tiles with the warps that they want."""
    if is_elementwise(of):
        for block_m in (16, 32, 64, 128):
            yield replace(of, block_m=block_m)
        yield replace(of, num_warps=2 * of.num_warps)
        return
    tiles = (64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (256, 128), (256, 64)
    changes: list[dict[str, Any]] = [
        *({"num_stages": stages} for stages in (2, 3, 4, 5)),
        *({"num_warps": warps} for warps in (2, 4, 8)),
        *({"block_k": block_k} for block_k in (32, 64, 128)),
        *({"block_m": m, "block_n": n, "num_warps": warps} for m, n in tiles for warps in (4, 8)),
    ]
    if direction is Direction.WEIGHT_GRAD:
        changes += ({"splits": max(1, round(of.splits * factor))} for factor in (0.5, 2, 4))
    yield from (replace(of, **change) for change in changes)


def _missing(choice: ConvPlan, device: torch.device) -> str:
    """Why ``choice`` cannot run on ``device``, or nothing."""
    if device.type != "cpu":
        return ""
    if not EMULATE:
        return "the kernels need a CUDA device"
    return "" if family_of(choice).emulated else "the interpreter cannot run it"


def with_plan(question: Question, choice: ConvPlan) -> Callable[..., torch.Tensor]:
    """The function of x, w and ∂L/∂y that launches ``choice``."""
    p, direction = question.problem, question.direction

    def run(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        a, b = {
            Direction.FORWARD: (x, w),
            Direction.INPUT_GRAD: (dy, w),
            Direction.WEIGHT_GRAD: (dy, x),
        }[direction]
        prepared = conv.prepared_for(p, direction, a, b, question.channels_last, plan=choice)
        return conv.run(prepared, a, b)[0]

    return run


register(Plans())
