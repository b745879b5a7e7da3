"""RMS norm with a residual and an activation: see :mod:`gpukern.ops.layer_norm`, which has the mathematics."""

from __future__ import annotations

import torch

from gpukern.ops._activation.reference import in_torch
from gpukern.ops.layer_norm import declare

_aten = torch.ops.aten


def _in_torch(input, weight, residual, normalized_shape, eps, activation, negative_slope, dtype) -> torch.Tensor:
    x = input if dtype is None else _aten.to.dtype(input, dtype)
    z = _aten.rms_norm.default(x, normalized_shape, weight, eps)
    return in_torch(z if residual is None else _aten.add.Tensor(z, residual), activation, negative_slope)


#: ``act(x / √(mean(x²) + eps) · weight + residual)``, contiguous, in ``dtype`` or the input's; the weight may have any.
rms_norm = declare("rms_norm", False, _in_torch)
