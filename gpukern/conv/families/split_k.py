"""Workspace for split-K: programs each compute a part of a sum, and the last to arrive adds all parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from gpukern.conv.plan import ConvPlan
from gpukern.runtime.counters import zeroed_counters


class Parts(NamedTuple):
    """Partial sums [tiles, splits, block_m, block_n], in the dtype of sums, and a counter for each tile, int32 zero."""

    sums: torch.Tensor
    counters: torch.Tensor


#: Makes them on a device.
Workspace = Callable[[torch.device], Parts]


def split_k_workspace(plan: ConvPlan, tiles: int, dtype: torch.dtype = torch.float32) -> Workspace | None:
    """Return the workspace of a launch of so many tiles; None if no sum is shared."""
    if plan.splits == 1:
        return None
    size = tiles * plan.splits * plan.block_m * plan.block_n

    def workspace(device: torch.device) -> Parts:
        return Parts(torch.empty(size, dtype=dtype, device=device), zeroed_counters(tiles, device))

    return workspace
