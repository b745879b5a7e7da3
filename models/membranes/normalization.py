"""Sections as networks like them: zero in the mean, one in the deviation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Normalization:
    """``(x − mean) / deviation`` with those of the sections that were trained on."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, images: np.ndarray) -> Normalization:
        return cls(float(images.mean(dtype=np.float64)), float(max(images.std(dtype=np.float64), 1e-6)))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) / self.deviation
