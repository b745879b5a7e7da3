"""``torch.autocast`` for functions that PyTorch runs in lower precision under it, or in float32."""

from __future__ import annotations

from typing import Any, overload

import torch

#: Whether autocast is on for any device. Testing it before calling :func:`autocast` halves the time.
is_any_autocast_enabled = torch._C._is_any_autocast_enabled


@overload
def autocast(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, /
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]: ...
@overload
def autocast(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, /
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]: ...
def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors in autocast's dtype where autocast is on for their device (float64 is left alone, as torch does)."""
    # The first is the input, which is never None.
    device_type = tensors[0].device.type  # type: ignore[union-attr]
    # Tensors without memory have no autocast, and querying it raises.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        tensor.to(dtype)
        if tensor is not None and tensor.is_floating_point() and tensor.dtype is not torch.float64
        else tensor
        for tensor in tensors
    )


def runs_in_fp32(input: torch.Tensor) -> bool:
    """Whether autocast computes a function that it runs in float32 so, not in the dtype of ``input``."""
    device_type = input.device.type
    return (
        device_type != "meta"
        and torch.is_autocast_enabled(device_type)
        and input.dtype in (torch.float16, torch.bfloat16)
    )


def autocast_to_float32(*tensors: Any) -> tuple[Any, ...]:
    """The tensors in float32 where autocast is on for a GPU, as torch has those of functions that sum much."""
    if not is_any_autocast_enabled() or tensors[0].device.type != "cuda" or not torch.is_autocast_enabled("cuda"):
        return tensors
    return tuple(
        tensor.to(torch.float32) if tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16) else tensor
        for tensor in tensors
    )
