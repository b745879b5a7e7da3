"""Filter strides and tap distances, as kernels that read through pointers take them."""

from __future__ import annotations

import math

from gpukern.conv.layouts import Strides
from gpukern.conv.problem import ConvProblem


def filter_strides(problem: ConvProblem, weight: Strides, transposed: bool) -> Strides:
    """Return the strides of ``indexing.Filter`` from those of [K, C/groups, R, S]."""
    k, c, r, s = weight
    group = problem.group_outputs * k
    return (group, c, k, r, s) if transposed else (group, k, c, r, s)


def tap_options(problem: ConvProblem, transposed: bool) -> dict[str, int]:
    """Return the distances between a phase's taps in the filter, see ``indexing``."""
    step_h, step_w = 1, 1
    if transposed:
        step_h, step_w = (s // math.gcd(s, d) for s, d in zip(problem.stride, problem.dilation, strict=True))
    return {"TAP_STEP_H": step_h, "TAP_STEP_W": step_w, "TRANSPOSED": transposed}


def window_options(problem: ConvProblem) -> dict[str, int]:
    return {
        "TAPS_H": problem.R,
        "TAPS_W": problem.S,
        "STRIDE_H": problem.stride[0],
        "STRIDE_W": problem.stride[1],
        "DILATION_H": problem.dilation[0],
        "DILATION_W": problem.dilation[1],
    }
