"""The stand-in of a batch of patches, on which a model runs once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from gpukern.densify.values import BATCH, Value


class Patch(fx.Proxy):
    """The stand-in of a tensor. In-place operators of Python are those of a tensor, not assignments."""

    value: Value

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.value.shape)

    @property
    def ndim(self) -> int:
        return self.value.rank

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.value.rank

    def numel(self) -> int:
        return math.prod(self.shape)

    def __len__(self) -> int:
        return BATCH

    def __iadd__(self, other: Any) -> Any:
        return self.add_(other)

    def __isub__(self, other: Any) -> Any:
        return self.sub_(other)

    def __imul__(self, other: Any) -> Any:
        return self.mul_(other)

    def __itruediv__(self, other: Any) -> Any:
        return self.div_(other)
