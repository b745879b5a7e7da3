"""Precision of fp32 products by PyTorch's own flags, and the error bound of each mode.

Relative errors of one product x · w, beside which its rounding in the fp32 sum is nothing:

- *TF32* keeps 11 significant bits of an operand. Rounded to nearest it is off by 2⁻¹¹ at most, a product of two by
  2 · 2⁻¹¹ = 2⁻¹⁰. Tensor cores do not round: given plain fp32 they truncate the low 13 bits, which is off by less than
  2⁻¹⁰, always towards zero, and a product by 2 · 2⁻¹⁰ = 2⁻⁹.
- *TF32 three times*: each operand is h + l with 11 bits each, both rounded, so 2⁻²² of it is lost, and so is
  l · l′ ≤ 2⁻²² of the product: 3 · 2⁻²² in all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

TF32_ROUNDED = 2.0**-10
TF32_CUT = 2.0**-9
TF32X3 = 3 * 2.0**-22


def conv_precision(dtype: torch.dtype) -> str:
    """Triton's ``input_precision`` for a convolution: follows ``torch.backends.cudnn.conv.fp32_precision``."""
    if dtype is not torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]


def matmul_precision(dtype: torch.dtype) -> str:
    """Triton's ``input_precision`` for a matrix product: follows ``torch.backends.cuda.matmul.fp32_precision``."""
    if dtype is not torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@contextlib.contextmanager
def fp32_products(conv: str | None = None, matmul: str | None = None) -> Iterator[None]:
    """fp32 convolutions and matrix products in ``"ieee"`` or ``"tf32"``, torch's and gpukern's; None: as they are.

    Afterwards each flag has its own value again, or inherits as before. A convolution's flag is set through
    ``torch.backends.cudnn.fp32_precision``, which it follows until it is given a value of its own: torch's default,
    TF32 unless a flag above it differs, cannot be restored after that. Meanwhile torch does not report the old
    ``torch.backends.cudnn.allow_tf32`` if the two disagree; that of matrix products is set too.
    """
    above, cuda = torch.backends, torch.backends.cudnn
    own_above = above.fp32_precision  # type: ignore[attr-defined]
    own_cuda = _own(cuda, above, own_above)
    convolutions, products = cuda.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    own_matmul, own_conv = _own(products, cuda, own_cuda), None
    # The old flag for matrix products, which sets CPUs and GPUs alike.
    cpu = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    own_cpu = _own(cpu, above, own_above)
    old_matmul = _old_matmul_precision(products, own_matmul)
    allowed = (matmul or products.fp32_precision) == "tf32"
    try:
        if conv is not None and convolutions.fp32_precision != conv:
            before = convolutions.fp32_precision
            cuda.fp32_precision = conv
            if convolutions.fp32_precision != conv:
                own_conv = before
                convolutions.fp32_precision = conv
        if (products.fp32_precision == "tf32") is not allowed:
            products.allow_tf32 = allowed
        yield
    finally:
        if own_conv is not None:
            convolutions.fp32_precision = own_conv
        cuda.fp32_precision = own_cuda
        torch.set_float32_matmul_precision(old_matmul)
        products.fp32_precision = own_matmul
        cpu.fp32_precision = own_cpu


def _own(flag: Any, above: Any, aboves: str) -> str:
    """The value that ``flag`` was given, "none" where it follows the flag ``above``, whose own value is ``aboves``."""
    other = "ieee" if flag.fp32_precision == "tf32" else "tf32"
    try:
        above.fp32_precision = other
        follows = flag.fp32_precision == other
    finally:
        above.fp32_precision = aboves
    return "none" if follows else flag.fp32_precision


def _old_matmul_precision(products: Any, own: str) -> str:
    """Return ``torch.get_float32_matmul_precision()``, which torch gives only if the new flag agrees."""
    try:
        for value in (own, "ieee", "tf32"):
            products.fp32_precision = value
            with contextlib.suppress(RuntimeError):
                return torch.get_float32_matmul_precision()
    finally:
        products.fp32_precision = own
    return "highest"
