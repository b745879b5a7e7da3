"""Nodes that multiply each channel by a constant and add one: batch norm in evaluation mode, and plain arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from gpukern.fusion.constants import all_constant, constant, known_constant
from gpukern.fusion.program import Program, arguments, aten, is_call, operation, tensor_of, value


@dataclass(frozen=True)
class Affine:
    """``y = scale · x + shift`` for each channel (dimension 1), fp64 [C]: what ``node`` computes."""

    node: Node
    name: str
    scale: torch.Tensor
    shift: torch.Tensor


def as_affine(program: Program, node: Node, input: Node) -> Affine | None:
    """Return the affine map of ``node`` on the channels of ``input``; None if it is not the same in every call."""
    before, after = value(input), value(node)
    if before is None or after is None or before.dim() < 2:
        return None
    if before.dim() != after.dim() or before.dtype != after.dtype or before.shape[1] != after.shape[1]:
        return None
    if is_batch_norm(node):
        return _batch_norm(program, node) if arguments(node)["input"] is input else None
    return _arithmetic(program, node, input, int(before.shape[1]))


def is_batch_norm(node: Any) -> bool:
    return is_call(node, aten.batch_norm.default)


def is_any_batch_norm(node: Any) -> bool:
    """Whether ``node`` is a batch norm, including the forms that return statistics and gpukern's own."""
    return is_call(node) and "batch_norm" in operation(node)


def foldable(program: Program, node: Node) -> bool:
    """Whether a batch norm computes the same function in every call: from stored statistics, not the batch's."""
    given = arguments(node)
    kept = given["running_mean"] is not None and given["running_var"] is not None
    return (
        not given["training"] and kept and all_constant(program, node, "weight", "bias", "running_mean", "running_var")
    )


def _batch_norm(program: Program, node: Node) -> Affine | None:
    if not foldable(program, node):
        return None
    given = arguments(node)
    mean, var = (known_constant(program, given[name]).double() for name in ("running_mean", "running_var"))
    scale = (var + given["eps"]).rsqrt()
    if given["weight"] is not None:
        scale = scale * known_constant(program, given["weight"]).double()
    shift = -mean * scale
    if given["bias"] is not None:
        shift = shift + known_constant(program, given["bias"]).double()
    return Affine(node, "batch_norm", scale, shift)


def _arithmetic(program: Program, node: Node, input: Node, channels: int) -> Affine | None:
    """``input`` times, plus, minus or divided by a constant, as a frozen batch norm is written out."""
    targets: dict[Any, str] = {
        aten.mul.Tensor: "scale",
        aten.mul.Scalar: "scale",
        aten.div.Tensor: "scale",
        aten.div.Scalar: "scale",
        aten.add.Tensor: "shift",
        aten.add.Scalar: "shift",
        aten.sub.Tensor: "shift",
        aten.sub.Scalar: "shift",
    }
    if not is_call(node, *targets) or len(node.args) < 2:
        return None
    first, second = node.args[:2]
    commutes = node.target in (aten.mul.Tensor, aten.add.Tensor)
    other = second if first is input else first if commutes and second is input else None
    factor = _per_channel(program, other, input, channels)
    if factor is None or (first is second):
        return None
    name = targets[node.target]
    alpha = arguments(node).get("alpha", 1)
    if second is input and alpha != 1:
        return None
    if name == "scale":
        scale = factor if node.target in (aten.mul.Tensor, aten.mul.Scalar) else factor.reciprocal()
        return Affine(node, name, scale, torch.zeros_like(scale))
    sign = -alpha if node.target in (aten.sub.Tensor, aten.sub.Scalar) else alpha
    return Affine(node, name, torch.ones_like(factor), sign * factor)


def _per_channel(program: Program, other: Any, input: Node, channels: int) -> torch.Tensor | None:
    """A constant operand as fp64 [C]; None if it is not one number for each channel."""
    if isinstance(other, (int, float)) and not isinstance(other, bool):
        return torch.full((channels,), float(other), dtype=torch.float64, device=tensor_of(input).device)
    held = constant(program, other)
    if held is None or not held.is_floating_point():
        return None
    if held.numel() == 1 and held.dim() <= tensor_of(input).dim():
        return held.double().reshape(1).expand(channels).clone()
    place = 1 - (tensor_of(input).dim() - held.dim())
    if place < 0 or held.numel() != channels or held.shape[place] != channels:
        return None
    return held.double().reshape(channels)
