"""Convolutions and pools of volumes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpukern.functional._conv import autocast_operands, named_padding
from gpukern.ops import conv3d as _conv3d
from gpukern.ops import conv_transpose3d as _conv_transpose3d
from gpukern.ops import pool3d as _pool3d
from gpukern.ops.activation import check_activation
from gpukern.runtime.amp import is_any_autocast_enabled, runs_in_fp32
from gpukern.runtime.arguments import (
    as_bool,
    as_int,
    as_triple,
    check_batched_or_not,
    check_operand_tensors,
    check_tensors,
)
from gpukern.runtime.integers import require
from gpukern.runtime.tensors import check_floating


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
    input, weight, bias, residual = autocast_operands("conv3d", input, weight, bias, residual)
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
    input, weight, bias, residual = autocast_operands("conv_transpose3d", input, weight, bias, residual)
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


def max_pool3d(
    input: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""``y[n,c,z,p,q] = max_{t,r,s} x[n, c, z·stride + t·dilation − padding, …]``, −∞ outside; NaN wins.

    ``input`` is [N, C, D, H, W] or one volume [C, D, H, W] of any strides; kernel, stride, padding and dilation are an
    int or (depth, height, width). ``return_indices`` also returns the int64 places (d·H + h)·W + w of the maxima. All
    else is as in :func:`gpukern.functional.max_pool2d`: [N, C, Z, P, Q] in the layout of ``input``. Raises as
    ``torch.nn.functional.max_pool3d``, before anything is computed.
    """
    check_tensors("max_pool3d", input)
    check_floating("max_pool3d", input)
    input = _autocast(input)
    if input.dim() != 5 and check_batched_or_not("max_pool3d", input, batched=5):
        pooled = max_pool3d(input.unsqueeze(0), kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        return _one(pooled)
    kernel, stride = _window(kernel_size, stride)
    padding, dilation = as_triple("padding", padding), as_triple("dilation", dilation)
    windows = _pool3d.fixed(kernel, stride, padding, dilation, as_bool("ceil_mode", ceil_mode))
    return _pool3d.max_pool(input, windows, bool(return_indices))


def avg_pool3d(
    input: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> torch.Tensor:
    r"""``y[n,c,z,p,q] = Σ_{t,r,s} x[n, c, z·stride + t − padding, …] / divisor``, zeros outside the volume.

    The divisor is as in :func:`gpukern.functional.avg_pool2d`, the other arguments and the errors as in
    :func:`max_pool3d`. The result is NCDHW, whatever the layout of ``input``, as torch's is. Sums in fp32.
    """
    check_tensors("avg_pool3d", input)
    check_floating("avg_pool3d", input)
    input = _autocast(input)
    if input.dim() != 5 and check_batched_or_not("avg_pool3d", input, batched=5):
        return avg_pool3d(
            input.unsqueeze(0), kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        ).squeeze(0)
    kernel, stride = _window(kernel_size, stride)
    return _pool3d.avg_pool3d(
        input,
        *_pool3d.fixed(kernel, stride, as_triple("padding", padding), (1, 1, 1), as_bool("ceil_mode", ceil_mode)),
        as_bool("count_include_pad", count_include_pad),
        None if divisor_override is None else as_int("divisor_override", divisor_override),
    )


def adaptive_avg_pool3d(input: torch.Tensor, output_size: int | Sequence[int | None]) -> torch.Tensor:
    r"""``y[n,c,z,p,q]`` is the mean of x over the planes ⌊z·D/Z⌋ … ⌈(z+1)·D/Z⌉ − 1 and likewise rows and columns.

    ``output_size`` is an int or (Z, P, Q), where None keeps the size of the input. input [N, C, D, H, W] or
    [C, D, H, W] gives [N, C, Z, P, Q] or [C, Z, P, Q], NCDHW as torch's. Sums in fp32. Raises RuntimeError for sizes
    or dtypes that do not fit (ValueError for too few dimensions), TypeError for arguments of a wrong type.
    """
    size = _adaptive_size("adaptive_avg_pool3d", input, output_size)
    if size == (1, 1, 1) and 0 in input.shape:
        return input.mean((-3, -2, -1), keepdim=True)  # of no voxels: NaN, as torch's
    _check_not_empty("adaptive_avg_pool3d", input)
    input = _autocast(input)
    if input.dim() == 4:
        return adaptive_avg_pool3d(input.unsqueeze(0), size).squeeze(0) if input.shape[0] else _no_channels(input, size)
    return _pool3d.avg_pool3d(input, *_pool3d.adaptive(size), False, None)


def adaptive_max_pool3d(
    input: torch.Tensor, output_size: int | Sequence[int | None], return_indices: bool = False
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""``y[n,c,z,p,q]`` is the maximum of x over the windows of :func:`adaptive_avg_pool3d`; a NaN wins.

    ``return_indices`` also returns the int64 places (d·H + h)·W + w of the maxima. Arguments, result and errors are
    otherwise as in :func:`adaptive_avg_pool3d`.
    """
    size = _adaptive_size("adaptive_max_pool3d", input, output_size)
    _check_not_empty("adaptive_max_pool3d", input)
    input = _autocast(input)
    if input.dim() == 4:
        if not input.shape[0]:
            values = _no_channels(input, size)
            return (values, values.to(torch.int64)) if return_indices else values
        return _one(adaptive_max_pool3d(input.unsqueeze(0), size, return_indices))
    return _pool3d.max_pool(input, _pool3d.adaptive(size), bool(return_indices))


def _autocast(input: torch.Tensor) -> torch.Tensor:
    """``input`` in float32 under autocast on a CPU, which pools volumes in it; on a GPU it has no say in this."""
    if is_any_autocast_enabled() and input.device.type == "cpu" and runs_in_fp32(input):
        return input.to(torch.float32)
    return input


def _one(pooled: torch.Tensor | tuple[torch.Tensor, torch.Tensor]):
    """The result for one volume, from that for a batch of it."""
    return tuple(each.squeeze(0) for each in pooled) if isinstance(pooled, tuple) else pooled.squeeze(0)


def _no_channels(input: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
    return input.new_empty((0, *size))


def _check_not_empty(function: str, input: torch.Tensor) -> None:
    """All but the first dimension: the batch, or a single volume's channels."""
    require(
        all(size != 0 for size in input.shape[1:]),
        f"{function}(): expected input to have non-zero size for non-batch dimensions, but input has sizes "
        f"{list(input.shape)}",
    )


def _adaptive_size(function: str, input: torch.Tensor, output_size: int | Sequence[int | None]) -> tuple[int, int, int]:
    """Check ``input``, and return the size of the result."""
    check_tensors(function, input)
    check_floating(function, input)
    too_few = RuntimeError if isinstance(output_size, int) else ValueError
    if input.dim() != 5:
        check_batched_or_not(function, input, too_few, batched=5)
    if isinstance(output_size, Sequence) and not isinstance(output_size, str):
        if len(output_size) != 3:
            raise RuntimeError(f"output_size must have 3 elements, got {output_size!r}")
        return as_triple(
            "output_size",
            [n if wanted is None else wanted for wanted, n in zip(output_size, input.shape[-3:], strict=True)],
        )
    return as_triple("output_size", output_size)


def _window(kernel_size, stride) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(kernel, stride); a stride of None or () is the kernel's size."""
    kernel = as_triple("kernel_size", kernel_size)
    if stride is None or (isinstance(stride, (tuple, list)) and not stride):
        return kernel, kernel
    return kernel, as_triple("stride", stride)
