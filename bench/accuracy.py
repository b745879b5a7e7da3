"""Accuracy check of a result before it is timed.

The error against float64 is ‖y − ref‖ / ‖ref‖ (Frobenius), or a sixth of max |y − ref| / max |ref| if that is more:
among 10⁸ errors of random sign the largest is within six times their root mean square, so a result that only rounds
passes both, and one wrong element in a large result, which the norm does not detect, fails the second. For sums of K
products of independent random operands

    bound = 2 · eps + √K · 2⁻²² (+ 2⁻⁹ with TF32)

- *eps* of the stored dtype: one rounding of the output is at most eps/2 relative, element by element; 2 · eps leaves
  room for implementations that round partial sums to the dtype too (cuBLAS does by default in 16 bit).
- *√K · 2⁻²²*: each of K fp32 additions errs by at most 2⁻²³ of a partial sum (tensor cores truncate), with random signs
  √K · 2⁻²³ of the final sum's own standard deviation; twice that.
- *2⁻⁹*: both operands of a product truncated to TF32's 11 bits, as by other people's Triton kernels
  (:mod:`gpukern.runtime.precision`); cuDNN and gpukern round them, 2⁻¹⁰.

A wrong index, a missing tap or an unwritten output is off by far more. The tests of the kernels use tighter bounds for
each element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gpukern.runtime.precision import TF32_CUT

#: The benchmark's name of a dtype → the tensors' dtype. TF32 is a way of multiplying float32.
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "tf32": torch.float32,
    "float32": torch.float32,
}


#: Standard deviations in which the largest of all errors lies.
_LARGEST = 6


def sum_bound(dtype: str, terms: int) -> float:
    """Return the bound for sums of ``terms`` products."""
    tf32 = TF32_CUT if dtype == "tf32" else 0.0
    return 2 * torch.finfo(DTYPES[dtype]).eps + math.sqrt(max(terms, 1)) * 2.0**-22 + tf32


def network_bound(dtype: str, sums: Sequence[int], training: bool) -> float:
    """Return the bound for a network whose layers sum ``sums`` products: logits, or its last gradient if ``training``.

    Logits: each layer adds a relative error of about eps, and √K · 2⁻²³ by its sums of K products, of random sign: the
    root of their squares, four times. In 16 bits that is 4 · √depth · eps.
    In training, batch norm divides by the statistics of few pixels, and errors of a network with random weights grow
    with depth rather than its root: of plain PyTorch against itself in float64 up to 8 · depth · eps were seen
    (ResNet-50, 4 images of 64 × 64). That is a coarse check, never coarser than ½: it finds garbage, a wrong loss or a
    layer left out. What each layer's kernels compute is checked by the layer's own suite.
    """
    eps = torch.finfo(DTYPES[dtype]).eps + (TF32_CUT if dtype == "tf32" else 0.0)
    if training:
        return min(8 * len(sums) * eps, 0.5)
    return 4 * math.hypot(*(eps + math.sqrt(terms) * 2.0**-23 for terms in sums))


def relative_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """The error as above; infinite where ``actual`` is not finite or has another shape."""
    if actual.shape != reference.shape:
        return math.inf
    if not actual.numel():
        return 0.0
    difference = actual.detach().to(reference) - reference
    errors = (
        (torch.linalg.vector_norm(difference, order) / torch.linalg.vector_norm(reference, order).clamp_min(1e-300))
        for order in (2, math.inf)
    )
    norm, largest = (error.item() for error in errors)
    error = max(norm, largest / _LARGEST)
    return error if math.isfinite(norm + largest) else math.inf
