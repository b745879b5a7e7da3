"""The plan of a call: forced, measured, or expected to be the fastest. No torch, no Triton."""

from __future__ import annotations

from typing import NamedTuple

from gpukern.conv import database
from gpukern.conv.plan import ConvPlan, Direction, Operands
from gpukern.conv.planner import heuristic_plan
from gpukern.conv.problem import ConvProblem
from gpukern.runtime.device import DeviceSpec

#: The last one takes the place of every choice; see :func:`gpukern.conv.hooks.force_plan`.
forced: list[ConvPlan] = []


class Choice(NamedTuple):
    """A plan, and whether the plan database has it."""

    plan: ConvPlan
    measured: bool


def choose(problem: ConvProblem, direction: Direction, operands: Operands, device: DeviceSpec) -> Choice:
    """The plan of a call; RuntimeError where all that could run it are switched off."""
    if forced:
        return Choice(forced[-1], False)
    measured = database.lookup(problem, direction, operands, device)
    if measured is not None:
        return Choice(measured, True)
    return Choice(heuristic_plan(problem, direction, operands, device), False)
