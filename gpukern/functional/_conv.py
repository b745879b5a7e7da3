"""Convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpukern.conv import same_paddings
from gpukern.ops import conv1d as _conv1d
from gpukern.ops import conv2d as _conv2d
from gpukern.ops import conv_transpose1d as _conv_transpose1d
from gpukern.ops import conv_transpose2d as _conv_transpose2d
from gpukern.ops.activation import check_activation
from gpukern.runtime.amp import autocast, is_any_autocast_enabled
from gpukern.runtime.arguments import as_int, as_pair, as_single, check_batched_or_not, check_operand_tensors
from gpukern.runtime.tensors import check_alike


def conv2d(
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
    r"""``y[n,k,p,q] = act(Σ_{c,r,s} x[n, c, p·stride + r·dilation − padding, …] · w[k,c,r,s] + b[k] + residual[…])``.

    Parameters
    ----------
    input:
        [N, C, H, W] or one image [C, H, W]; any strides.
    weight:
        [K, C/groups, R, S].
    bias:
        [K] or None.
    stride, dilation:
        an int or a (vertical, horizontal) pair.
    padding:
        zeros added on both sides of each dimension (int or pair), ``"valid"`` (none) or ``"same"`` (stride 1 only;
        where the total is odd the bottom and the right get the larger part).
    groups:
        splits channels into independent convolutions; ``groups == C`` is a depthwise convolution.
    residual:
        gpukern's extension: what is added before the activation, of the result's shape.
    activation:
        gpukern's extension, one of :data:`gpukern.ops.activation.ACTIVATIONS`: ``"relu"`` or any other function of
        :mod:`gpukern.functional` for activations, ``"leaky_relu"`` with its ``negative_slope``, and ``"gelu_tanh"``.
        It and the residual cost no extra pass over memory, but in training: all but relu, sigmoid and tanh keep what
        goes into them, as torch's do, in a pass of their own.

    Returns
    -------
    [N, K, P, Q] with P = ⌊(H + 2·padding − dilation·(R−1) − 1)/stride⌋ + 1, in channels_last if input or weight is.
    Products are accumulated in fp32; for fp32 operands ``torch.backends.cudnn.conv.fp32_precision``, which the old
    ``torch.backends.cudnn.allow_tf32`` sets too, decides about TF32.

    Raises
    ------
    RuntimeError for sizes, dtypes or devices that do not fit; TypeError for arguments of a wrong type; ValueError for
    an unknown activation. As ``torch.nn.functional.conv2d``, before anything is computed.
    """
    check_operand_tensors("conv2d", input, weight, bias, residual)
    if input.dim() != 4 and check_batched_or_not("conv2d", input):
        return conv2d(
            input.unsqueeze(0), weight, bias, stride, padding, dilation, groups,
            residual=None if residual is None else residual.unsqueeze(0),
            activation=activation, negative_slope=negative_slope,
        ).squeeze(0)  # fmt: skip
    stride, dilation = as_pair("stride", stride), as_pair("dilation", dilation)
    padding = sides(padding, weight, stride, dilation)
    input, weight, bias, residual = autocast_operands("conv2d", input, weight, bias, residual)
    return _conv2d.apply(
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


def autocast_operands(
    function: str,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The operands of a convolution in autocast's dtype, where one is in force."""
    if is_any_autocast_enabled():
        input, weight, bias, residual = autocast(input, weight, bias, residual)
    if bias is not None and bias.dtype is not input.dtype:
        check_alike(function, input, bias)  # a folded bias may be float32; torch's layers have none such
    return input, weight, bias, residual


def sides(padding: int | Sequence[int] | str, weight, stride, dilation) -> tuple[int, int, int, int]:
    """(top, bottom, left, right)."""
    if isinstance(padding, str):
        top, bottom, left, right = named_padding(padding, weight, stride, dilation)
        return top, bottom, left, right
    vertical, horizontal = as_pair("padding", padding)
    return vertical, vertical, horizontal, horizontal


def named_padding(name: str, weight, stride, dilation) -> tuple[int, ...]:
    """(before, after) of each dimension, of "valid" and "same"."""
    if name == "valid":
        return (0, 0) * len(stride)
    if name != "same":
        raise RuntimeError(f"invalid padding string: {name!r}, expected 'valid' or 'same'")
    if any(step != 1 for step in stride):
        raise RuntimeError("padding='same' is not supported for strided convolutions")
    if weight.dim() != len(stride) + 2:
        return (0, 0) * len(stride)  # the operator says what is wrong with it
    return same_paddings(tuple(weight.shape[2:]), dilation)


def conv_transpose2d(
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
    r"""``y[n, c, p·stride + r·dilation − padding, …] = act(Σ_{k,r,s} x[n,k,p,q] · w[k,c,r,s] + b[c] + residual[…])``.

    The gradient of :func:`conv2d` for its input, as an operation. ``input`` is [N, K, P, Q] or one image, ``weight``
    [K, C/groups, R, S], ``bias`` [C]; the result [N, C, H, W] has H = (P − 1)·stride − 2·padding + dilation·(R − 1) +
    output_padding + 1. All else, gpukern's extensions too, is as in :func:`conv2d`. Raises as
    ``torch.nn.functional.conv_transpose2d``, before anything is computed.
    """
    check_operand_tensors("conv_transpose2d", input, weight, bias, residual)
    if input.dim() != 4 and check_batched_or_not("conv_transpose2d", input):
        return conv_transpose2d(
            input.unsqueeze(0), weight, bias, stride, padding, output_padding, groups, dilation,
            residual=None if residual is None else residual.unsqueeze(0),
            activation=activation, negative_slope=negative_slope,
        ).squeeze(0)  # fmt: skip
    stride, dilation = as_pair("stride", stride), as_pair("dilation", dilation)
    padding, extra = as_pair("padding", padding), as_pair("output_padding", output_padding)
    input, weight, bias, residual = autocast_operands("conv_transpose2d", input, weight, bias, residual)
    return _conv_transpose2d.apply(
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


# ---- sequences -----------------------------------------------------------------------------------------------------


def conv1d(
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
    r"""``y[n,k,q] = act(Σ_{c,s} x[n, c, q·stride + s·dilation − padding] · w[k,c,s] + b[k] + residual[n,k,q])``.

    Parameters
    ----------
    input:
        [N, C, L] or one sequence [C, L]; any strides. One whose channels are adjacent, the transpose of [N, L, C], is
        read as it is.
    weight:
        [K, C/groups, S].
    stride, padding, dilation:
        an int or a sequence of one; ``padding`` also ``"valid"``, ``"same"``, and as gpukern's extension ``"causal"``:
        dilation·(S − 1) zeros before the sequence and none after it, so that no output depends on later inputs.
    bias, groups, residual, activation, negative_slope:
        as in :func:`conv2d`.

    Returns
    -------
    [N, K, Q] with Q = ⌊(L + 2·padding − dilation·(S−1) − 1)/stride⌋ + 1, contiguous as torch's, or with adjacent
    channels if those of ``weight`` are. It runs on the kernels of :func:`conv2d`, as images of height 1; depthwise ones
    of stride 1 on a kernel of their own, which reads and writes each sequence about once.

    Raises
    ------
    as ``torch.nn.functional.conv1d``; see :func:`conv2d`.
    """
    check_operand_tensors("conv1d", input, weight, bias, residual)
    if input.dim() != 3 and check_batched_or_not("conv1d", input, batched=3):
        return conv1d(
            input.unsqueeze(0), weight, bias, stride, padding, dilation, groups,
            residual=None if residual is None else residual.unsqueeze(0),
            activation=activation, negative_slope=negative_slope,
        ).squeeze(0)  # fmt: skip
    stride, dilation = as_single("stride", stride), as_single("dilation", dilation)
    padding = _ends(padding, weight, stride, dilation)
    input, weight, bias, residual = autocast_operands("conv1d", input, weight, bias, residual)
    return _conv1d.apply(
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


def _ends(padding: int | Sequence[int] | str, weight, stride, dilation) -> tuple[int, int]:
    """(before, after)."""
    if padding == "causal" and weight.dim() == 3:
        return dilation[0] * max(weight.shape[2] - 1, 0), 0
    if isinstance(padding, str):
        before, after = named_padding(padding, weight, stride, dilation)
        return before, after
    (both,) = as_single("padding", padding)
    return both, both


def conv_transpose1d(
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
    r"""``y[n, c, q·stride + s·dilation − padding] = act(Σ_{k,s} x[n,k,q] · w[k,c,s] + b[c] + residual[…])``.

    The gradient of :func:`conv1d` for its input, as an operation. ``input`` is [N, K, Q] or one sequence, ``weight``
    [K, C/groups, S], ``bias`` [C]; the result [N, C, L] has L = (Q − 1)·stride − 2·padding + dilation·(S − 1) +
    output_padding + 1. All else is as in :func:`conv1d`. Raises as ``torch.nn.functional.conv_transpose1d``, before
    anything is computed.
    """
    check_operand_tensors("conv_transpose1d", input, weight, bias, residual)
    if input.dim() != 3 and check_batched_or_not("conv_transpose1d", input, batched=3):
        return conv_transpose1d(
            input.unsqueeze(0), weight, bias, stride, padding, output_padding, groups, dilation,
            residual=None if residual is None else residual.unsqueeze(0),
            activation=activation, negative_slope=negative_slope,
        ).squeeze(0)  # fmt: skip
    stride, dilation = as_single("stride", stride), as_single("dilation", dilation)
    padding, extra = as_single("padding", padding), as_single("output_padding", output_padding)
    input, weight, bias, residual = autocast_operands("conv_transpose1d", input, weight, bias, residual)
    return _conv_transpose2d.transposed(
        _conv_transpose1d.conv_transpose1d,
        (input, weight, bias, residual),
        (stride, padding, extra, dilation, as_int("groups", groups)),
        check_activation(activation, negative_slope),
        negative_slope,
    )
