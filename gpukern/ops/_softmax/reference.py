"""Softmax in plain torch: the path of CPU tensors, and the oracle of the tests."""

from __future__ import annotations

import torch


def softmax(input: torch.Tensor, dim: int, log: bool, dtype: torch.dtype) -> torch.Tensor:
    """``exp(x) / Σ exp(x)`` along ``dim`` or, if ``log``, its logarithm; ``input`` is cast to ``dtype`` first."""
    # In halves torch rounds the logarithm of the sum on the way.
    wide = torch.promote_types(dtype, torch.float32)
    return (torch.log_softmax if log else torch.softmax)(input, dim, dtype=wide).to(dtype)


def softmax_backward(grad: torch.Tensor, output: torch.Tensor, dim: int, log: bool, dtype: torch.dtype) -> torch.Tensor:
    """``∂L/∂x = y · (g − Σ g·y)`` or, if ``log``, ``g − exp(y) · Σ g``: in ``dtype``, contiguous."""
    return gradient(grad, output, dim, log, dtype).contiguous()


def gradient(grad: torch.Tensor, output: torch.Tensor, dim: int, log: bool, dtype: torch.dtype) -> torch.Tensor:
    """Compute the formulas of :func:`softmax_backward`, in fp32 at least and in any layout."""
    wide = torch.promote_types(output.dtype, torch.float32)
    g, y = grad.to(wide), output.to(wide)
    result = g - y.exp() * g.sum(dim, keepdim=True) if log else y * (g - (g * y).sum(dim, keepdim=True))
    return result.to(dtype)


def tangent(tangent: torch.Tensor, output: torch.Tensor, dim: int) -> torch.Tensor:
    """The tangent of the logarithm, ``∂x − Σ exp(y)·∂x``, in the dtype of ``output``."""
    wide = torch.promote_types(output.dtype, torch.float32)
    d, y = tangent.to(wide), output.to(wide)
    return (d - (y.exp() * d).sum(dim, keepdim=True)).to(output.dtype)
