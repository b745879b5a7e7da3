"""Noise and agreement of a model's outputs beside the original's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


def decibels(signal: float, noise: float) -> float:
    """``10 log₁₀(signal / noise)`` of energies: ∞ without noise, −∞ without signal or where the noise is not finite."""
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal and math.isfinite(noise) else -math.inf


@dataclass
class Energies:
    """Sums of squares of a value and of what is wrong with it, over batches."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, found: torch.Tensor, truth: torch.Tensor) -> None:
        """Infinite noise for what is not finite where the truth is; elsewhere that is not counted."""
        found, truth = found.double(), truth.double()
        finite = truth.isfinite()
        if not finite.all():
            found, truth = torch.where(finite, found, 0.0), torch.where(finite, truth, 0.0)
        self.signal += truth.square().sum().item()
        noise = (found - truth).square().sum().item()
        self.noise += noise if math.isfinite(noise) else math.inf

    @property
    def snr(self) -> float:
        return decibels(self.signal, self.noise)


@dataclass
class Score:
    """Beside the truth, over batches, by the place of an output: ``agreed`` of its ``rows`` have the truth's argmax or,
    of outputs that are no numbers, the same element; ``energies`` of floating-point numbers."""

    rows: dict[int, int] = field(default_factory=dict)
    agreed: dict[int, int] = field(default_factory=dict)
    energies: dict[int, Energies] = field(default_factory=dict)

    def add(self, outputs: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> None:
        """Count a batch. ValueError for outputs of another number or shape."""
        if [each.shape for each in outputs] != [each.shape for each in truth]:
            raise ValueError("the outputs are of other shapes than the original's")
        for place, (y, t) in enumerate(zip(outputs, truth, strict=True)):
            if not t.is_floating_point():
                self._count(place, y == t)
                continue
            self.energies.setdefault(place, Energies()).add(y, t)
            if t.dim() >= 2 and t.shape[1] > 1 and t.numel():
                self._count(place, y.argmax(1) == t.argmax(1))

    def _count(self, place: int, same: torch.Tensor) -> None:
        self.rows[place] = self.rows.get(place, 0) + same.numel()
        self.agreed[place] = self.agreed.get(place, 0) + int(same.sum())

    @property
    def snr(self) -> float:
        """Of the worst output, in decibels."""
        return min((each.snr for each in self.energies.values()), default=math.inf)

    @property
    def agreement(self) -> float:
        """The share of rows that agree, in the worst output; without rows, 1 − noise / signal."""
        shares = [self.agreed[place] / count for place, count in self.rows.items() if count]
        return min(shares) if shares else max(0.0, 1 - 10 ** (-self.snr / 10))
