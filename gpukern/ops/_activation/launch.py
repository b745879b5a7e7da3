"""Launches of the element-wise kernels, in functions of the same names and signatures as ``reference.py``."""

from __future__ import annotations

import torch
import triton

from gpukern.ops._activation import kernels
from gpukern.ops._activation.properties import PROPERTIES
from gpukern.runtime.launcher import index_type, launch
from gpukern.runtime.strides import is_dense
from gpukern.runtime.tensors import check_kernel_dtype, elementwise_like

# 1024 elements on 4 warps are 8 for each thread: one 16-byte access in half precision, two in fp32.
_BLOCK = 1024


def activation(x: torch.Tensor, name: str, negative_slope: float) -> torch.Tensor:
    # torch computes relu6 as hardtanh, which keeps all strides of a dense tensor; the others are element-wise.
    out = torch.empty_like(x) if name == "relu6" else elementwise_like(x)
    return _run(kernels.activation_kernel, out, (x,), negative_slope, NAME=name)


def activation_(x: torch.Tensor, name: str, negative_slope: float) -> None:
    if x.is_contiguous() or is_dense(x.shape, x.stride()):
        _run(kernels.activation_kernel, x, (x,), negative_slope, NAME=name)
    else:
        x.copy_(activation(x, name, negative_slope))


def activation_grad(grad: torch.Tensor, saved: torch.Tensor, name: str, negative_slope: float) -> torch.Tensor:
    return _run(kernels.activation_grad_kernel, elementwise_like(saved), (grad, saved), negative_slope, NAME=name)


def activation_grad_grad(grad: torch.Tensor, grad_grad: torch.Tensor, saved: torch.Tensor, name: str) -> torch.Tensor:
    if PROPERTIES[name].piecewise_linear:
        return torch.zeros_like(saved)
    return _run(kernels.activation_grad_grad_kernel, elementwise_like(saved), (grad, grad_grad, saved), NAME=name)


def _run(kernel, out: torch.Tensor, operands: tuple[torch.Tensor, ...], *scalars: float, NAME: str) -> torch.Tensor:
    """Run an element-wise kernel over ``operands``, all brought into the memory order of ``out``, which is dense."""
    check_kernel_dtype(NAME, out.dtype)
    if out.numel() == 0:
        return out
    contiguous = out.is_contiguous()
    dense = [
        t if t.stride() == out.stride() or (contiguous and t.is_contiguous()) else torch.empty_like(out).copy_(t)
        for t in operands
    ]
    size = out.numel()
    launch(
        kernel,
        (triton.cdiv(size, _BLOCK),),
        out.device,
        (*dense, out, size, *scalars),
        {"NAME": NAME, "BLOCK": _BLOCK, "INDEX": index_type(size), "num_warps": 4},
    )
    return out
