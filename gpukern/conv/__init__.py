"""The convolution engine: problems, plans, predictions, launches. Code outside the package imports only this module."""

from __future__ import annotations

import importlib
from typing import Any

from gpukern.conv import reference as reference
from gpukern.conv.plan import ConvPlan, Direction, Layout, Operands, Variant
from gpukern.conv.problem import (
    ConvProblem,
    Padding,
    Pair,
    conv_problem,
    matrix_problem,
    of_rows,
    output_size,
    output_sizes,
    pooled_problem,
    same_padding,
    same_paddings,
    sequence_problem,
    transposed_problem,
    transposed_sequence_problem,
    transposed_size,
    transposed_sizes,
)
from gpukern.conv.volumes.problem import (
    Sides,
    Triple,
    VolumeProblem,
    transposed_volume_problem,
    volume_problem,
)

#: Module → its public names, imported on first use: importing all of planning takes 30 ms, and ``launch`` needs Triton.
_LATER = {
    "gpukern.conv.choice": ("Choice", "choose"),
    "gpukern.conv.cost": ("is_elementwise", "minimum_work"),
    "gpukern.conv.database": ("Entry",),
    "gpukern.conv.estimate": ("MEASURED", "Constants", "expected"),
    "gpukern.conv.exclusions": ("Exclusion",),
    "gpukern.conv.families.registry": ("family_of",),
    "gpukern.conv.hooks": ("force_plan", "observe"),
    "gpukern.conv.launch": ("conv2d_input_grad_norm", "prepared_for", "run", "write"),
    "gpukern.conv.layouts": ("Shape", "Strides"),
    "gpukern.conv.planner": (
        "Ranked",
        "candidates",
        "heuristic_plan",
        "only_measured",
        "ranked",
        "ranking",
        "switched_off",
    ),
    "gpukern.conv.pooled.plan": ("seconds_apart",),
    "gpukern.conv.pooled.problem": ("POOL_WINDOWS",),
    "gpukern.conv.quantized.launch": ("launch_quantized",),
    "gpukern.conv.prepare": ("forget", "pooled_choice", "prepare_launch"),
    "gpukern.conv.request": (
        "Call",
        "Epilogue",
        "NormBefore",
        "Prepared",
        "Types",
        "check_countable",
        "dtypes_of",
        "operands_of",
        "shapes",
    ),
}
_HOMES = {name: module for module, names in _LATER.items() for name in names}

__all__ = [
    "ConvPlan",
    "ConvProblem",
    "Direction",
    "Layout",
    "Operands",
    "Padding",
    "Pair",
    "Variant",
    "conv_problem",
    "matrix_problem",
    "of_rows",
    "Sides",
    "Triple",
    "VolumeProblem",
    "output_size",
    "output_sizes",
    "pooled_problem",
    "reference",
    "same_padding",
    "same_paddings",
    "sequence_problem",
    "transposed_problem",
    "transposed_sequence_problem",
    "transposed_size",
    "transposed_sizes",
    "transposed_volume_problem",
    "volume_problem",
    "database",
    *_HOMES,
]


def __getattr__(name: str) -> Any:
    if name == "database":  # the module itself: keys, files, look-ups
        return importlib.import_module("gpukern.conv.database")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value
