"""Convolutions of volumes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpukern.functional._conv import named_padding
from gpukern.ops import conv3d as _conv3d
from gpukern.ops import conv_transpose3d as _conv_transpose3d
from gpukern.ops.activation import check_activation
from gpukern.runtime.amp import autocast, is_any_autocast_enabled
from gpukern.runtime.arguments import as_int, as_triple, check_batched_or_not, check_operand_tensors
from gpukern.runtime.tensors import check_alike


def conv3d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> torch.Tensor:
    r"""``y[n,k,z,p,q] = act(Σ_{c,t,r,s} x[n, c, z·stride + t·dilation − padding, …] · w[k,c,t,r,s] + b[k] + …)``.

    ``input`` is [N, C, D, H, W] or one volume [C, D, H, W] of any strides, ``weight`` [K, C/groups, T, R, S], ``bias``
    [K] or None. ``stride``, ``padding`` and ``dilation`` are an int or (depth, height, width); a padding of ``"same"``
    puts the larger part of an odd total behind, below and to the right. Groups, gpukern's extensions ``residual`` and
    ``activation``, and the precision of products are as in :func:`gpukern.functional.conv2d`.

    Returns
    -------
    [N, K, Z, P, Q] with Z = ⌊(D + 2·padding − dilation·(T−1) − 1)/stride⌋ + 1, in channels_last_3d if input or weight
    is. Both layouts are read and written as they are. Where stride and kernel are equal, without padding and dilation,
    as in patch embeddings, it is one matrix product.

    Raises
    ------
    RuntimeError for sizes, dtypes or devices that do not fit; TypeError for arguments of a wrong type; ValueError for
    an unknown activation. As ``torch.nn.functional.conv3d``, before anything is computed.
    """
    check_operand_tensors("conv3d", input, weight, bias, residual)
    if input.dim() != 5 and check_batched_or_not("conv3d", input, batched=5):
        return conv3d(
            input.unsqueeze(0), weight, bias, stride, padding, dilation, groups,
            residual=None if residual is None else residual.unsqueeze(0),
            activation=activation, negative_slope=negative_slope,
        ).squeeze(0)  # fmt: skip
    stride, dilation = as_triple("stride", stride), as_triple("dilation", dilation)
    padding = _sides(padding, weight, stride, dilation)
    if is_any_autocast_enabled():
        input, weight, bias, residual = autocast(input, weight, bias, residual)
    if bias is not None and bias.dtype is not input.dtype:
        check_alike("conv3d", input, bias)  # a folded bias may be float32; torch's layers have none such
    return _conv3d.apply(
        input,
        weight,
        bias,
        residual,
        stride,
        padding,
        dilation,
        as_int("groups", groups),
        check_activation(activation, negative_slope),
        negative_slope,
    )


def _sides(padding: int | Sequence[int] | str, weight, stride, dilation) -> tuple[int, int, int, int, int, int]:
    """(front, back, top, bottom, left, right)."""
    if isinstance(padding, str):
        front, back, top, bottom, left, right = named_padding(padding, weight, stride, dilation)
        return front, back, top, bottom, left, right
    depth, vertical, horizontal = as_triple("padding", padding)
    return depth, depth, vertical, vertical, horizontal, horizontal


def conv_transpose3d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> torch.Tensor:
    r"""``y[n, c, z·stride + t·dilation − padding, …] = act(Σ_{k,t,r,s} x[n,k,z,p,q] · w[k,c,t,r,s] + b[c] + …)``.

    The gradient of :func:`conv3d` for its input, as an operation. ``input`` is [N, K, Z, P, Q] or one volume,
    ``weight`` [K, C/groups, T, R, S], ``bias`` [C]; the result [N, C, D, H, W] has D = (Z − 1)·stride − 2·padding +
    dilation·(T − 1) + output_padding + 1. All else, gpukern's extensions too, is as in :func:`conv3d`. Raises as
    ``torch.nn.functional.conv_transpose3d``, before anything is computed.
    """
    check_operand_tensors("conv_transpose3d", input, weight, bias, residual)
    if input.dim() != 5 and check_batched_or_not("conv_transpose3d", input, batched=5):
        return conv_transpose3d(
            input.unsqueeze(0), weight, bias, stride, padding, output_padding, groups, dilation,
            residual=None if residual is None else residual.unsqueeze(0),
            activation=activation, negative_slope=negative_slope,
        ).squeeze(0)  # fmt: skip
    stride, dilation = as_triple("stride", stride), as_triple("dilation", dilation)
    padding, extra = as_triple("padding", padding), as_triple("output_padding", output_padding)
    if is_any_autocast_enabled():
        input, weight, bias, residual = autocast(input, weight, bias, residual)
    if bias is not None and bias.dtype is not input.dtype:
        check_alike("conv_transpose3d", input, bias)
    return _conv_transpose3d.apply(
        input,
        weight,
        bias,
        residual,
        stride,
        padding,
        extra,
        dilation,
        as_int("groups", groups),
        check_activation(activation, negative_slope),
        negative_slope,
    )
