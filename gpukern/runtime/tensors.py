"""Dtype, device and memory-format checks shared by the operations."""

from __future__ import annotations

import torch

from gpukern.runtime.strides import is_channels_last


def check_alike(operation: str, input: torch.Tensor, *others: torch.Tensor | None) -> None:
    """Raise RuntimeError, as torch does, unless all tensors share ``input``'s dtype and device."""
    dtype, device = input.dtype, input.device
    for other in others:
        if other is None or (other.dtype is dtype and other.device == device):
            continue
        if other.dtype is not dtype:
            raise RuntimeError(
                f"{operation}: expected all tensors to have the same dtype, but got {input.dtype} and {other.dtype}"
            )
        raise RuntimeError(
            f"{operation}: expected all tensors to be on the same device, "
            f"but found at least two devices, {input.device} and {other.device}"
        )


def check_bias(operation: str, input: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Check as :func:`check_alike`, but a bias may be float32 beside any input, as folding leaves it."""
    if bias is not None and not (bias.dtype is torch.float32 and bias.device == input.device):
        check_alike(operation, input, bias)


def check_operands(
    operation: str,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
) -> None:
    """Apply :func:`check_alike` to input, weight and residual, and :func:`check_bias`."""
    dtype, device = input.dtype, input.device
    if residual is not None or weight.dtype is not dtype or weight.device != device:
        check_alike(operation, input, weight, residual)
    if bias is not None and (bias.dtype is not dtype or bias.device != device):
        check_bias(operation, input, bias)


def check_floating(operation: str, input: torch.Tensor) -> None:
    """Raise NotImplementedError, torch's RuntimeError for a dtype, unless ``input`` is real floating point."""
    if not input.is_floating_point():
        raise NotImplementedError(f"{operation} is not implemented for {input.dtype}: expected a floating-point tensor")


def memory_format_of(*tensors: torch.Tensor) -> torch.memory_format:
    """Return torch's output layout for such operands: channels_last, that of their rank, if the strides of any are."""
    for tensor in tensors:
        if tensor.dim() in (4, 5) and is_channels_last(tensor.shape, tensor.stride()):
            return as_memory_format(True, tensor.dim())
    return torch.contiguous_format


def format_kept_by(tensor: torch.Tensor) -> torch.memory_format:
    """Return the layout of torch's batch norm output: NCHW if the input is dense in both, else by the strides."""
    if tensor.dim() not in (4, 5):
        return torch.contiguous_format
    channels_last = as_memory_format(True, tensor.dim())
    if tensor.numel() == 0:  # dense in every layout: the strides are what is kept
        last = torch.empty(tensor.shape, device="meta", memory_format=channels_last)
        return as_memory_format(tensor.stride() == last.stride(), tensor.dim())
    if tensor.is_contiguous():
        return torch.contiguous_format
    if tensor.is_contiguous(memory_format=channels_last):
        return channels_last
    return memory_format_of(tensor)


def elementwise_like(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Allocate in the layout of torch's element-wise results: dense, in the order of ``tensor``, uninitialised."""
    # Unlike empty_like, they give a contiguous tensor's result the usual strides, of dimensions of one element too.
    if tensor.is_contiguous():
        return tensor.new_empty(tensor.shape, dtype=dtype)
    if tensor.dim() in (4, 5) and tensor.is_contiguous(memory_format=as_memory_format(True, tensor.dim())):
        return torch.empty_like(tensor, dtype=dtype, memory_format=as_memory_format(True, tensor.dim()))
    return torch.empty_like(tensor, dtype=dtype)


def laid_out(tensor: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """Return ``tensor`` dense in ``memory_format``, including the strides of dimensions of one element."""
    # contiguous() keeps those strides if both formats agree, and to() keeps a tensor with gaps.
    return tensor.contiguous(memory_format=memory_format).to(memory_format=memory_format)


def as_memory_format(channels_last: bool, rank: int = 4) -> torch.memory_format:
    """Return the memory format that operators carry as a flag, for tensors of 4 dimensions or of 5."""
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last if rank == 4 else torch.channels_last_3d


#: Dtypes that the kernels take.
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_kernel_dtype(operation: str, dtype: torch.dtype) -> None:
    """Raise NotImplementedError, which is a RuntimeError, unless the kernels take ``dtype``."""
    if dtype not in KERNEL_DTYPES:
        raise NotImplementedError(f"{operation}: gpukern's kernels take float32, float16 and bfloat16, but got {dtype}")
