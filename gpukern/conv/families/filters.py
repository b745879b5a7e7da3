"""Filter strides and tap distances, as kernels that read through pointers take them."""

from __future__ import annotations

import math

from gpukern.conv.layouts import Strides, alignment
from gpukern.conv.problem import ConvProblem
from gpukern.conv.volumes.problem import VolumeProblem


def filter_strides(problem: ConvProblem | VolumeProblem, weight: Strides, transposed: bool) -> Strides:
    """Return the strides of ``indexing.Filter`` from those of [K, C/groups, R, S], or with one more dimension."""
    k, c, *taps = weight
    group = problem.group_outputs * k
    return (group, c, k, *taps) if transposed else (group, k, c, *taps)


def filter_alignment(problem: ConvProblem | VolumeProblem, weight: Strides) -> int:
    """Return the :func:`gpukern.conv.layouts.alignment` of a filter, whose runs may lie along C/groups or along K."""
    if weight[1] == 1:
        return alignment(weight, 1, 16)
    # Along K a group starts after group_outputs elements.
    return alignment(weight, 0, 16 if problem.groups == 1 else problem.group_outputs)


def tap_options(problem: ConvProblem, transposed: bool) -> dict[str, int]:
    """Return the distances between a phase's taps in the filter, see ``indexing``."""
    step_h, step_w = tap_steps(problem, transposed)
    return {"TAP_STEP_H": step_h, "TAP_STEP_W": step_w, "TRANSPOSED": transposed}


def tap_steps(problem: ConvProblem | VolumeProblem, transposed: bool) -> tuple[int, ...]:
    """Return the distance between a phase's taps in the filter, along each dimension."""
    if not transposed:
        return (1,) * len(problem.stride)
    return tuple(s // math.gcd(s, d) for s, d in zip(problem.stride, problem.dilation, strict=True))


def window_options(problem: ConvProblem) -> dict[str, int]:
    return {
        "TAPS_H": problem.R,
        "TAPS_W": problem.S,
        "STRIDE_H": problem.stride[0],
        "STRIDE_W": problem.stride[1],
        "DILATION_H": problem.dilation[0],
        "DILATION_W": problem.dilation[1],
    }
