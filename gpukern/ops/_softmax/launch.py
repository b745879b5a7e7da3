"""Softmax by the kernels, in functions of the same names and signatures as ``reference.py``."""

from __future__ import annotations

import torch

from gpukern.ops._softmax import kernels
from gpukern.ops._softmax.tiles import tiles_of, walkable
from gpukern.runtime.launcher import launch
from gpukern.runtime.tensors import check_kernel_dtype


def softmax(input: torch.Tensor, dim: int, log: bool, dtype: torch.dtype) -> torch.Tensor:
    check_kernel_dtype("softmax", input.dtype)
    check_kernel_dtype("softmax", dtype)
    output = input.new_empty(input.shape, dtype=dtype)
    if output.numel():
        _run(kernels.softmax_kernel, dim, log, walkable(input), output)
    return output


def softmax_backward(grad: torch.Tensor, output: torch.Tensor, dim: int, log: bool, dtype: torch.dtype) -> torch.Tensor:
    check_kernel_dtype("softmax", dtype)
    out = output.new_empty(output.shape, dtype=dtype)
    if out.numel():
        _run(kernels.softmax_backward_kernel, dim, log, walkable(grad), walkable(output), out)
    return out


def _run(kernel, dim: int, log: bool, *tensors: torch.Tensor) -> None:
    tiles = tiles_of(dim, *tensors, kept=len(tensors) - 1)
    launch(kernel, (tiles.plan.steps,), tensors[0].device, (*tiles.images, tiles.sizes), {"LOG": log} | tiles.options)
