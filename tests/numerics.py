"""When a result is right: the error bounds of all tests, derived once.

A sum of products of ``terms`` pairs (a convolution, a matrix product) is right when

    |y − ref| ≤ ε_sum · (|x| ∗ |w|) + ε_out · |ref| + smallest

- *Products.* Two 16-bit significands multiply exactly in fp32. TF32 and three products of it err as derived in
  :mod:`gpukern.runtime.precision`; our kernels round what they
  multiply, on a GPU and emulated.
- *Sum.* Each fp32 addition errs by at most 2⁻²⁴ of the partial sum (2⁻²³ on tensor cores, which truncate), and a
  partial sum is at most ``|x| ∗ |w|``. Rounding errors of random sign add up like a random walk of
  √terms steps. Six standard deviations of it, taken over every element of a test, are never passed by chance: c = 6.
- *Output.* One rounding to the output's dtype: half of eps, taken whole to cover an activation's own rounding.
- *smallest* is the dtype's smallest subnormal, for outputs that underflow.
"""

from __future__ import annotations

import math

import torch

from gpukern.runtime.mode import EMULATE
from gpukern.runtime.precision import TF32_ROUNDED, TF32X3
from tests.device import DEVICE

FP32_EPS = torch.finfo(torch.float32).eps  # 2⁻²³

_SMALLEST_SUBNORMAL = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


def sum_bound(
    reference: torch.Tensor, absolute: torch.Tensor, terms: int, dtype: torch.dtype, *, tf32: bool = False
) -> torch.Tensor:
    """The bound above: ``reference`` and ``absolute`` (= |x| ∗ |w|) in float64."""
    eps_sum = 6 * FP32_EPS * math.sqrt(max(terms, 1))
    if tf32:
        eps_sum += TF32_ROUNDED
    elif dtype is torch.float32:
        eps_sum += TF32X3
    return eps_sum * absolute + rounding_bound(reference, dtype)


def rounding_bound(reference: torch.Tensor, dtype: torch.dtype, roundings: float = 1.0) -> torch.Tensor:
    """``roundings`` roundings to ``dtype`` of values the size of ``reference`` (float64)."""
    return roundings * torch.finfo(dtype).eps * reference.abs() + _SMALLEST_SUBNORMAL[dtype]


def assert_within(name: str, actual: torch.Tensor, reference: torch.Tensor, bound: torch.Tensor) -> None:
    """Every element of ``actual`` lies within ``bound`` of ``reference``; NaN only where the reference is NaN."""
    assert actual.shape == reference.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    actual = actual.detach().double().cpu()
    both_nan = actual.isnan() & reference.isnan()
    equal = actual == reference  # infinities
    error = (actual - reference).abs()
    bad = ~((error <= bound) | both_nan | equal)  # also where the error is NaN
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} elements out of bound; at {where} got {actual[where]:.9g}, "
            f"expected {reference[where]:.9g}, error {error[where]:.3g}, bound {bound[where]:.3g}"
        )


def uses_tf32(dtype: torch.dtype, precision: str) -> bool:
    """Whether the kernels' products of ``dtype`` are TF32. The reference on a CPU has none."""
    return (EMULATE or DEVICE.type == "cuda") and dtype is torch.float32 and precision == "tf32"
