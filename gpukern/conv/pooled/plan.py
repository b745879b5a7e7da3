"""A convolution and the maximum of 2 × 2 pixels of what it makes: one launch, or two? No torch, no Triton."""

from __future__ import annotations

from gpukern.conv.estimate import pass_seconds
from gpukern.conv.plan import ConvPlan, Direction, Operands
from gpukern.conv.planner import Ranked, heuristic_plan, only_measured, ranked, ranking
from gpukern.conv.pooled.problem import windows_of
from gpukern.conv.problem import ConvProblem, pooled_problem
from gpukern.ops._pool2d import cost_model as pool
from gpukern.runtime.device import DeviceSpec


def together(problem: ConvProblem, operands: Operands, device: DeviceSpec) -> Ranked | None:
    """The one launch that is expected to be the fastest; ``operands.output`` is the layout of the maxima.

    None where no kernel can: of groups, those that pool in their epilogue want 8 channels or more.
    """
    found = ranking(pooled_problem(problem), Direction.FORWARD, operands, device)
    return next((each for each in found if not only_measured(each.plan)), None)


def seconds_apart(problem: ConvProblem, operands: Operands, device: DeviceSpec) -> float:
    """The seconds that both launches are expected to take; ``operands.output`` is the convolution's."""
    moved = pool.work(windows_of(problem), pool.Pooling.MAX, operands.itemsize).bytes
    first = heuristic_plan(problem, Direction.FORWARD, operands, device)
    return ranked(problem, Direction.FORWARD, first, operands, device).seconds + pass_seconds(moved, device)


def choose(problem: ConvProblem, of_both: Operands, of_convolution: Operands, device: DeviceSpec) -> ConvPlan | None:
    """The plan of the one launch; None where two are expected to be faster, or where there is nothing to launch.

    The kernels that can pool are not always the fastest for a layer, but they write a quarter, and nobody reads it
    back.
    """
    if not problem.N:
        return None
    one = together(problem, of_both, device)
    return one.plan if one and one.seconds <= seconds_apart(problem, of_convolution, device) else None
