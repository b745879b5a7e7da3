"""How fp32 products may be computed, as PyTorch's own flags ask, and how far each way may err.

Relative errors of one product x · w, beside which its rounding in the fp32 sum is nothing:

- *TF32* keeps 11 significant bits of an operand. Rounded to nearest it is off by 2⁻¹¹ at most, a product of two by
  2 · 2⁻¹¹ = 2⁻¹⁰. Tensor cores round nothing: handed fp32 as it is they cut the low 13 bits, which is off by less than
  2⁻¹⁰, always towards zero, and a product by 2 · 2⁻¹⁰ = 2⁻⁹.
- *TF32 three times*: each operand is h + l with 11 bits each, both rounded, so 2⁻²² of it is lost, and so is
  l · l′ ≤ 2⁻²² of the product: 3 · 2⁻²² in all.
"""

from __future__ import annotations

import torch

TF32_ROUNDED = 2.0**-10
TF32_CUT = 2.0**-9
TF32X3 = 3 * 2.0**-22


def conv_precision(dtype: torch.dtype) -> str:
    """Triton's ``input_precision`` for a convolution: ``"tf32"`` where ``torch.backends.cudnn`` allows it for fp32."""
    if dtype is not torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def matmul_precision(dtype: torch.dtype) -> str:
    """Triton's ``input_precision`` for a matrix product: follows ``torch.set_float32_matmul_precision``."""
    if dtype is not torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
