"""Workspace for split-K: programs each compute a part of a sum, and the last to arrive adds all parts."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gpukern.conv.plan import ConvPlan
from gpukern.runtime.counters import zeroed_counters

#: Makes (partial sums fp32 [tiles, splits, block_m, block_n], a counter for each tile, zero) on a device.
Workspace = Callable[[torch.device], tuple[torch.Tensor, torch.Tensor]]


def split_k_workspace(plan: ConvPlan, tiles: int) -> Workspace | None:
    """Return the workspace of a launch of so many tiles; None if no sum is shared."""
    if plan.splits == 1:
        return None
    size = tiles * plan.splits * plan.block_m * plan.block_n

    def workspace(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty(size, dtype=torch.float32, device=device), zeroed_counters(tiles, device)

    return workspace
