"""Choice of one launch or two for a convolution and a 2 × 2 max pool. Imports neither torch nor Triton."""

from __future__ import annotations

from gpukern.conv.estimate import pass_seconds
from gpukern.conv.plan import ConvPlan, Direction, Operands
from gpukern.conv.planner import Ranked, heuristic_plan, only_measured, ranked, ranking
from gpukern.conv.pooled.problem import windows_of
from gpukern.conv.problem import ConvProblem, pooled_problem
from gpukern.ops._pool2d import cost_model as pool
from gpukern.runtime.device import DeviceSpec


def together(problem: ConvProblem, operands: Operands, device: DeviceSpec) -> Ranked | None:
    """Return the single launch expected to be the fastest; ``operands.output`` is the layout of the maxima.

    None if no kernel can: those that pool in their epilogue need groups of 8 channels or more.
    """
    found = ranking(pooled_problem(problem), Direction.FORWARD, operands, device)
    return next((each for each in found if not only_measured(each.plan)), None)


def seconds_apart(problem: ConvProblem, operands: Operands, device: DeviceSpec) -> float:
    """Return the expected seconds of both launches; ``operands.output`` is the convolution's."""
    moved = pool.work(windows_of(problem), pool.Pooling.MAX, operands.itemsizes[2]).bytes
    first = heuristic_plan(problem, Direction.FORWARD, operands, device)
    return ranked(problem, Direction.FORWARD, first, operands, device).seconds + pass_seconds(moved, device)


def choose(problem: ConvProblem, of_both: Operands, of_convolution: Operands, device: DeviceSpec) -> ConvPlan | None:
    """Return the plan of the single launch; None if two are expected to be faster, or if there is nothing to launch.

    The kernels that can pool are not always the fastest for a layer, but they write a quarter as much, which is not
    read back.
    """
    if not problem.N:
        return None
    one = together(problem, of_both, device)
    return one.plan if one and one.seconds <= seconds_apart(problem, of_convolution, device) else None
