"""What a layer and an average pool of the scheme compute, in fp64 and by torch's own operators: independent of ours."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.fx import Node

from gpukern.fusion.program import arguments, aten
from gpukern.ops._activation.reference import activation

_ops = torch.ops.gpukern


class Expected(NamedTuple):
    """``value`` before it is rounded to what it is stored in; ``size``: the sum of the magnitudes of its terms."""

    value: torch.Tensor
    size: torch.Tensor


def layer(
    node: Node, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
) -> Expected:
    """``act(x ∗ w + b + residual)`` and the pool of a node of the 16-bit graph, from fp64 operands."""
    given: dict[str, Any] = arguments(node)
    value, size = product(node, x, weight), product(node, x.abs(), weight.abs())
    if bias is not None:
        shaped = bias if node.target is _ops.linear.default else bias.view(-1, 1, 1)
        value, size = value + shaped, size + shaped.abs()
    if residual is not None:
        value, size = value + residual, size + residual.abs()
    value = activation(value, given["activation"], given["negative_slope"])
    if node.target is _ops.conv2d_max_pool2d.default:
        value, size = F.max_pool2d(value, 2), F.max_pool2d(size, 2)
    return Expected(value, size)


def product(node: Node, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What a layer's node computes without bias, residual, activation and pool, by torch's operator."""
    given: dict[str, Any] = arguments(node)
    if node.target is _ops.linear.default:
        return F.linear(x, weight)
    stride, dilation, groups = given["stride"], given["dilation"], given["groups"]
    if node.target is _ops.conv_transpose2d.default:
        sizes = given["padding"], given["output_padding"]
        return F.conv_transpose2d(x, weight, None, stride, *sizes, groups, dilation)
    top, bottom, left, right = given["padding"]
    if top == bottom and left == right:
        return F.conv2d(x, weight, None, stride, (top, left), dilation, groups)
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, None, stride, 0, dilation, groups)


def average(node: Node, x: torch.Tensor) -> torch.Tensor:
    """What an average pool of the 16-bit graph makes of fp64 values."""
    given: dict[str, Any] = arguments(node)
    if node.target is aten.mean.dim:
        return x.mean(given["dim"], given["keepdim"])
    if node.target is _ops.adaptive_avg_pool2d.default:
        return F.adaptive_avg_pool2d(x, given["output_size"])
    names = ("kernel", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    return aten.avg_pool2d.default(x, *(given[name] for name in names))
