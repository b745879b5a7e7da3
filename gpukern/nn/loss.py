from __future__ import annotations

import torch

from gpukern import functional as F
from gpukern.nn.leaf import Leaf


class CrossEntropyLoss(Leaf, torch.nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` on gpukern's kernels. See :func:`gpukern.functional.cross_entropy`."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
