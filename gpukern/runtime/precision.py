"""How fp32 products may be computed, as PyTorch's own flags ask."""

from __future__ import annotations

import torch


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
