"""Distribution of the values of many tensors, gathered in one pass and in a few kilobytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

#: An even number, so that zero lies between two bins and halving the resolution merges whole pairs.
BINS = 256


@dataclass(frozen=True)
class Distribution:
    """Values of a layer. ``deviation`` is √(Σ(x − mean)²/count); NaN and infinities are in ``nonfinite`` only.

    ``histogram`` counts the values that are not zero in :data:`BINS` bins of equal width from −``limit`` to ``limit``,
    a power of two; ``zeros`` is the share of exact zeros.
    """

    count: int
    mean: float
    deviation: float
    smallest: float
    largest: float
    zeros: float
    nonfinite: int
    limit: float
    histogram: tuple[int, ...]

    @property
    def edges(self) -> list[float]:
        """The borders of the bins, one more than there are bins."""
        return [self.limit * (2 * number / BINS - 1) for number in range(BINS + 1)]


class Gathering:
    """Adds tensors up into a :class:`Distribution`.

    Means and deviations are merged by the formula of Chan, Golub and LeVeque (1979), which subtracts no large sums.
    """

    def __init__(self) -> None:
        self._count = self._zeros = self._nonfinite = 0
        self._mean = self._squares = 0.0
        self._smallest, self._largest = math.inf, -math.inf
        self._exponent: int | None = None
        self._bins = torch.zeros(BINS, dtype=torch.int64)

    def add(self, tensor: torch.Tensor) -> None:
        values = tensor.detach().flatten()
        # 16 bits hold no sums, and torch has no histogram of them on a CPU.
        values = values if values.dtype is torch.float64 else values.float()
        finite = values.isfinite()
        if not finite.all():
            self._nonfinite += int((~finite).sum())
            values = values[finite]
        if not values.numel():
            return
        self._merge(values)
        zeros = int((values == 0).sum())
        self._zeros += zeros
        smallest, largest = (float(each) for each in values.aminmax())
        self._smallest, self._largest = min(self._smallest, smallest), max(self._largest, largest)
        self._count_bins(values, max(abs(smallest), abs(largest)), zeros)

    def _merge(self, values: torch.Tensor) -> None:
        variance, mean = (float(each) for each in torch.var_mean(values, correction=0))
        if not math.isfinite(variance):  # squares beyond float32
            variance, mean = (float(each) for each in torch.var_mean(values.double(), correction=0))
        number = values.numel()
        total = self._count + number
        difference = mean - self._mean
        self._mean += difference * number / total
        self._squares += variance * number + difference * difference * self._count * number / total
        self._count = total

    def _count_bins(self, values: torch.Tensor, largest: float, zeros: int) -> None:
        if largest == 0:
            return
        fraction, exponent = math.frexp(largest)
        exponent -= fraction == 0.5
        if self._exponent is None:
            self._exponent = exponent
        while self._exponent < exponent:
            self._widen()
        if abs(self._exponent) > 100:  # of float32 the factor would be no number
            values = values.double()
        # By a power of two, which is exact.
        counts = torch.histc(values * 2.0 ** -max(self._exponent, -1022), BINS, -1.0, 1.0).to("cpu", torch.int64)
        counts[BINS // 2] -= zeros
        self._bins += counts

    def _widen(self) -> None:
        """Double the limit: two bins become one."""
        assert self._exponent is not None
        pairs = self._bins.view(BINS // 2, 2).sum(1)
        self._bins = torch.nn.functional.pad(pairs, (BINS // 4, BINS // 4))
        self._exponent += 1

    def result(self) -> Distribution | None:
        """Return the distribution; None if there was no value."""
        if not self._count and not self._nonfinite:
            return None
        if not self._count:
            nothing = (math.nan,) * 4
            return Distribution(0, *nothing, 0.0, self._nonfinite, 0.0, tuple(self._bins.tolist()))
        return Distribution(
            self._count,
            self._mean,
            math.sqrt(self._squares / self._count),
            self._smallest,
            self._largest,
            self._zeros / self._count,
            self._nonfinite,
            0.0 if self._exponent is None else 2.0**self._exponent,
            tuple(self._bins.tolist()),
        )
