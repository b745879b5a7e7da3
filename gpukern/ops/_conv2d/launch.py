"""Launches the convolution kernels. Functions of the same names and signatures as ``reference.py``."""

from __future__ import annotations

import torch

from gpukern.ops._conv2d import kernels, weight_kernels
from gpukern.ops._conv2d.gather import Filter
from gpukern.ops._conv2d.plan import channel_sum_splits
from gpukern.ops._conv2d.prepare import (
    Prepared,
    dense_strides,
    prepare_gather,
    prepare_weight_grad,
)
from gpukern.ops._conv2d.problem import ConvProblem
from gpukern.ops._image import Image, image
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.integers import cdiv
from gpukern.runtime.launch import index_type, launch, reach
from gpukern.runtime.precision import conv_precision
from gpukern.runtime.tensors import check_kernel_dtype


def conv2d(
    problem: ConvProblem,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    dtype, device = input.dtype, input.device
    prepared = prepare_gather(
        problem,
        False,
        input.stride(),
        weight.stride(),
        None,
        dtype,
        conv_precision(dtype),
        activation,
        device_spec(device),
    )
    return gather(prepared, input, weight, bias, new_output(prepared, input), negative_slope)


def conv2d_input_grad(
    problem: ConvProblem, grad: torch.Tensor, weight: torch.Tensor, channels_last: bool
) -> torch.Tensor:
    dtype = grad.dtype
    prepared = prepare_gather(
        problem,
        True,
        grad.stride(),
        weight.stride(),
        channels_last,
        dtype,
        conv_precision(dtype),
        "none",
        device_spec(grad.device),
    )
    return gather(prepared, grad, weight, None, new_output(prepared, grad))


def conv2d_weight_grad(
    problem: ConvProblem, grad: torch.Tensor, input: torch.Tensor, channels_last: bool
) -> torch.Tensor:
    dtype = grad.dtype
    prepared = prepare_weight_grad(
        problem, grad.stride(), input.stride(), channels_last, dtype, conv_precision(dtype), device_spec(grad.device)
    )
    return weight_grad(prepared, grad, input, new_output(prepared, grad))


def channel_sum(grad: torch.Tensor) -> torch.Tensor:
    check_kernel_dtype("channel_sum", grad.dtype)
    N, K, P, Q = grad.shape
    output = torch.empty(K, dtype=grad.dtype, device=grad.device)
    pixels = N * P * Q
    if pixels == 0 or K == 0:
        return output.zero_()
    splits = channel_sum_splits(pixels, K, device_spec(grad.device))
    partial = _partial_sums(output, splits)
    launch(
        weight_kernels.channel_sum_kernel,
        (cdiv(K, 64), splits),
        grad.device,
        (image(grad), partial, pixels, K, P, Q, cdiv(pixels, splits)),
        {"BLOCK_M": 64, "BLOCK_K": 64, "INDEX": index_type(reach(grad.shape, grad.stride())), "num_warps": 4},
    )
    _add_splits(partial, output, splits)
    return output


def gather(
    prepared: Prepared,
    source: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    negative_slope: float = 0.0,
) -> torch.Tensor:
    """Write ``output``: y from x, or ∂L/∂x from ∂L/∂y if prepared as transposed."""
    if output.numel() == 0:
        return output
    if prepared.pack[0]:
        source = _in_channel_runs(source)
    if prepared.pack[1]:
        weight = _in_channel_runs(weight)
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()  # the only operand that the kernel takes without strides
    launch(
        kernels.conv2d_gather_kernel,
        prepared.grid,
        output.device,
        (
            Image(source, *prepared.first),
            Filter(weight, *prepared.second),
            bias,
            Image(output, *prepared.output),
            *prepared.scalars,
            negative_slope,
        ),
        prepared.meta,
    )
    return output


def weight_grad(prepared: Prepared, grad: torch.Tensor, input: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Write ``output``, ∂L/∂w."""
    if output.numel() == 0:
        return output
    if grad.numel() == 0:
        return output.zero_()
    if prepared.pack[0]:
        grad = _in_channel_runs(grad)
    if prepared.pack[1]:
        input = _in_channel_runs(input)
    partial = _partial_sums(output, prepared.splits)
    launch(
        weight_kernels.conv2d_weight_grad_kernel,
        prepared.grid,
        output.device,
        (
            Image(grad, *prepared.first),
            Image(input, *prepared.second),
            Filter(partial, *prepared.output),
            *prepared.scalars,
        ),
        prepared.meta,
    )
    _add_splits(partial, output, prepared.splits)
    return output


def new_output(prepared: Prepared, like: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(prepared.shape, prepared.strides, dtype=like.dtype, device=like.device)


def _partial_sums(output: torch.Tensor, splits: int) -> torch.Tensor:
    """Where splits write: ``output`` itself if there is one, else fp32 [splits, ...] in ``output``'s memory order."""
    if splits == 1:
        return output
    return torch.empty((splits, output.numel()), dtype=torch.float32, device=output.device)


def _add_splits(partial: torch.Tensor, output: torch.Tensor, splits: int) -> None:
    if splits == 1:
        return
    size = output.numel()
    launch(
        weight_kernels.sum_splits_kernel,
        (cdiv(size, 256),),
        output.device,
        (partial, output, size, splits),
        {"BLOCK": 256, "num_warps": 4},
    )


def _in_channel_runs(tensor: torch.Tensor) -> torch.Tensor:
    """A channels_last copy of an image, a filter or a matrix, made by our own kernel."""
    if tensor.dim() == 2:
        tensor = tensor[:, :, None, None]
    N, C, H, W = tensor.shape
    strides = dense_strides(tensor.shape, channels_last=True)
    packed = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    pixels = N * H * W
    launch(
        kernels.to_channels_last_kernel,
        (cdiv(pixels, 64), cdiv(C, 64)),
        tensor.device,
        (image(tensor), image(packed), pixels, C, H, W),
        {
            "BLOCK_M": 64,
            "BLOCK_C": 64,
            "INDEX": index_type(max(reach(tensor.shape, tensor.stride()), packed.numel())),
            "num_warps": 4,
        },
    )
    return packed
