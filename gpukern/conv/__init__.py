"""The convolution engine: problems, plans, predictions, launches. Everything outside imports from here alone."""

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
    output_size,
    pooled_problem,
    same_padding,
    transposed_problem,
    transposed_size,
)

#: Module → what it offers, imported at the first use: all of planning takes 30 ms, and ``launch`` needs Triton.
_LAZY = {
    "choice": ("Choice", "choose"),
    "cost": ("is_elementwise", "minimum_work"),
    "database": ("Entry",),
    "estimate": ("MEASURED", "Constants", "expected"),
    "exclusions": ("Exclusion",),
    "families.registry": ("family_of",),
    "hooks": ("force_plan", "observe"),
    "launch": ("prepared_for", "run", "write"),
    "layouts": ("Shape", "Strides"),
    "planner": ("Ranked", "candidates", "heuristic_plan", "only_measured", "ranked", "ranking", "switched_off"),
    "pooled.plan": ("seconds_apart",),
    "pooled.problem": ("POOL_WINDOWS",),
    "prepare": ("forget", "pooled_choice", "prepare_launch"),
    "request": ("Call", "Epilogue", "Prepared", "check_countable", "operands_of", "shapes"),
}
_HOMES = {name: f"gpukern.conv.{module}" for module, names in _LAZY.items() for name in names}

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
    "output_size",
    "pooled_problem",
    "reference",
    "same_padding",
    "transposed_problem",
    "transposed_size",
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
