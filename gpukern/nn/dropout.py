"""Dropout layers. In evaluation they return their input."""

from __future__ import annotations

import torch

from gpukern import functional as F
from gpukern.nn.leaf import Leaf


class Dropout(Leaf, torch.nn.Dropout):
    """``torch.nn.Dropout`` on gpukern's kernels. See :func:`gpukern.functional.dropout`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.dropout(input, self.p, self.training, self.inplace)


class Dropout1d(Leaf, torch.nn.Dropout1d):
    """``torch.nn.Dropout1d`` on gpukern's kernels. See :func:`gpukern.functional.dropout1d`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.dropout1d(input, self.p, self.training, self.inplace)


class Dropout2d(Leaf, torch.nn.Dropout2d):
    """``torch.nn.Dropout2d`` on gpukern's kernels. See :func:`gpukern.functional.dropout2d`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.dropout2d(input, self.p, self.training, self.inplace)


class Dropout3d(Leaf, torch.nn.Dropout3d):
    """``torch.nn.Dropout3d`` on gpukern's kernels. See :func:`gpukern.functional.dropout3d`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.dropout3d(input, self.p, self.training, self.inplace)
