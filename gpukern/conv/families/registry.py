"""Registry of all kernel families. Imports neither torch nor Triton."""

from __future__ import annotations

import importlib

from gpukern.conv.families.family import Family
from gpukern.conv.plan import ConvPlan

#: The families' folders. The first supports every problem; among plans expected to be equally fast the first wins.
_NAMES = (
    "implicit_gemm",
    "tma_gemm",
    "tma_conv",
    "tma_wgrad",
    "tma_stem",
    "grouped",
    "depthwise",
    "depthwise1d",
    "warp_specialized",
)

FAMILIES: tuple[Family, ...] = tuple(
    importlib.import_module(f"gpukern.conv.families.{name}.plan").FAMILY for name in _NAMES
)

_BY_VARIANT = {variant: family for family in FAMILIES for variant in family.variants}


def family_of(plan: ConvPlan) -> Family:
    """Return the family of ``plan``'s kernel."""
    return _BY_VARIANT[plan.variant]
