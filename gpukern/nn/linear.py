from __future__ import annotations

import torch

from gpukern import functional as F
from gpukern.nn.leaf import Leaf


class Linear(Leaf, torch.nn.Linear):
    """``torch.nn.Linear`` on gpukern's kernels. See :func:`gpukern.functional.linear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._compute(input)

    def _compute(self, input: torch.Tensor, **epilogue) -> torch.Tensor:
        return F.linear(input, self.weight, self.bias, **epilogue)
