"""Rounding to 8 bits and back in plain torch: the path of CPU tensors, and the oracle of the tests."""

from __future__ import annotations

import torch

from gpukern.runtime.eight_bits import quantized


def quantize(input: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """``input / scale`` in 8 bits."""
    return quantized(input.to(torch.float32), scale, dtype)


def dequantize(input: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """``input · scale``, computed in fp32 and rounded once to ``dtype``."""
    return (input.to(torch.float32) * scale).to(dtype)
