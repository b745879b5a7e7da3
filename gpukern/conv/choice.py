"""Choice of a call's plan: forced, measured, or expected to be the fastest. Imports neither torch nor Triton."""

from __future__ import annotations

from typing import NamedTuple

from gpukern.conv import database
from gpukern.conv.plan import ConvPlan, Direction, Operands
from gpukern.conv.planner import heuristic_plan
from gpukern.conv.problem import ConvProblem
from gpukern.runtime.device import DeviceSpec

#: The last one overrides every choice; see :func:`gpukern.conv.hooks.force_plan`.
forced: list[ConvPlan] = []


class Choice(NamedTuple):
    """A plan, and whether the plan database has it."""

    plan: ConvPlan
    measured: bool


def choose(problem: ConvProblem, direction: Direction, operands: Operands, device: DeviceSpec) -> Choice:
    """Return the plan of a call; RuntimeError if every plan that could run it is switched off."""
    if forced:
        return Choice(forced[-1], False)
    measured = database.lookup(problem, direction, operands, device)
    if measured is not None:
        return Choice(measured, True)
    return Choice(heuristic_plan(problem, direction, operands, device), False)
