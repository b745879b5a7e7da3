"""Histograms of magnitudes, counted batch by batch: bounded memory, whatever the range turns out to be."""

from __future__ import annotations

import math

import torch

BINS = 2048


class Histogram:
    """Counts |x| in bins of one width from zero; when a larger number comes, pairs of bins are joined.

    ``width``: of a bin, a power of two. ``largest``: the largest magnitude.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.width = self.largest = 0.0

    def add(self, x: torch.Tensor) -> None:
        """Count the elements of ``x``."""
        if not x.numel():
            return
        low, high = (each.item() for each in x.aminmax())
        largest = max(-low, high)
        self.largest = max(self.largest, largest)
        if not largest:
            self.counts[0] += x.numel()
            return
        self._widen(largest)
        counts = torch.histc(x.detach().abs().float(), BINS, 0.0, self.width * BINS)
        self.counts += counts.double().cpu()

    def _widen(self, largest: float) -> None:
        if not self.width:
            self.width = 2.0 ** math.ceil(math.log2(largest / BINS))
        while self.width * BINS < largest:
            joined = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat([joined, torch.zeros_like(joined)])
            self.width *= 2

    @property
    def centers(self) -> torch.Tensor:
        return (torch.arange(BINS, dtype=torch.float64) + 0.5) * self.width
