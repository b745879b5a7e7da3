"""Fully-connected layers."""

from __future__ import annotations

import torch

from gpukern.ops import linear as _linear
from gpukern.ops.activation import check_activation
from gpukern.runtime.amp import autocast, is_any_autocast_enabled
from gpukern.runtime.arguments import check_operand_tensors
from gpukern.runtime.tensors import check_alike


def linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> torch.Tensor:
    r"""``y = act(x Wᵀ + b)``: input [*, in_features], weight [out_features, in_features] give [*, out_features].

    ``activation`` and ``negative_slope`` as in :func:`conv2d`. Accumulates in fp32; for fp32 operands
    ``torch.backends.cuda.matmul.fp32_precision``, which the old ``torch.set_float32_matmul_precision`` and
    ``torch.backends.cuda.matmul.allow_tf32`` set too, decides about TF32. Raises RuntimeError for sizes, dtypes or
    devices that do not fit, TypeError and ValueError as :func:`conv2d` does.
    """
    check_operand_tensors("linear", input, weight, bias)
    if bias is not None and bias.dim() == 0:
        bias = bias.reshape(1)
    if is_any_autocast_enabled():
        input, weight, bias = autocast(input, weight, bias)
    if bias is not None and bias.dtype is not input.dtype:
        check_alike("linear", input, bias)
    return _linear.apply(input, weight, bias, check_activation(activation, negative_slope), negative_slope)
