"""Arithmetic of folding, in fp64 from the original weights, with one rounding at the end.

With ``s`` and ``t`` the scale and shift of each output channel, ``s' , t'`` those of the input's:

    s (w ∗ (s' x + t') + b) + t = (s w s') ∗ x + s (b + w ∗ t') + t
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpukern import formatting
from gpukern.fusion.constants import known_constant
from gpukern.fusion.match import Match
from gpukern.fusion.program import Program

#: The share of a weight's norm that may lie in elements which the dtype holds with fewer digits, or as zero.
_SUBNORMAL_SHARE = 0.01


@dataclass(frozen=True)
class Folded:
    """``weight`` in the layer's ``dtype``, ``bias`` in fp32 at least; ``note``: why the dtype is not the model's."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    dtype: torch.dtype
    note: str = ""


def fold(program: Program, match: Match, dtype: torch.dtype) -> Folded:
    """Return the weight and bias with which the product of ``match`` computes all of the match in ``dtype``."""
    weight, bias = exact(program, match)
    reason = lost(weight, dtype)
    used = dtype if reason is None else torch.float32
    wide = torch.promote_types(used, torch.float32)
    return Folded(
        weight.to(used), None if bias is None else bias.to(wide), used, f"{reason}: in float32" if reason else ""
    )


def exact(program: Program, match: Match) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The folded weight and bias in fp64; no bias where there was none and nothing shifts."""
    product = match.own_product
    weight = known_constant(program, product.weight).double()
    bias = None if product.bias is None else known_constant(program, product.bias).double()
    groups, transposed = product.groups, product.transposed
    for step in reversed(match.before):
        # [1, C/groups] for each group: never transposed, see matcher.py.
        shift = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
        added = (grouped(shift, groups) * step.shift.view(groups, 1, -1)).sum(2).flatten()
        bias = added if bias is None else bias + added
        weight = scaled(weight, step.scale, groups, dim=1)
    for step in match.after:
        weight = scaled(weight, step.scale, groups, dim=1 if transposed else 0)
        bias = step.shift if bias is None else bias * step.scale + step.shift
    if not match.before and product.bias is None and all(not step.shift.any() for step in match.after):
        bias = None
    return weight, bias


def grouped(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """[A, B, ...] as [groups, A/groups, B, ...]."""
    return weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])


def scaled(weight: torch.Tensor, scale: torch.Tensor, groups: int, dim: int) -> torch.Tensor:
    """Scale each channel of dimension ``dim``; along dimension 1 every group has its own channels."""
    split = grouped(weight, groups)
    ones = [1] * (weight.dim() - 2)
    shape = (groups, -1, 1, *ones) if dim == 0 else (groups, 1, -1, *ones)
    return (split * scale.view(shape)).reshape(weight.shape)


def lost(weight: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Why ``dtype`` cannot hold a weight; None if it can.

    Elements below the smallest normal number keep fewer digits. They matter by their share of the norm: a layer always
    has some weights near zero, and they do no harm.
    """
    limits = torch.finfo(dtype)
    largest = weight.abs().max().item() if weight.numel() else 0.0
    if not largest <= limits.max:
        return f"weights up to {formatting.error(largest)} overflow {str(dtype).removeprefix('torch.')}"
    if dtype in (torch.float32, torch.float64):
        return None
    small = torch.where(weight.abs() < limits.tiny, weight, 0.0)
    if small.norm() > _SUBNORMAL_SHARE * weight.norm():
        return f"weights of at most {formatting.error(largest)} are subnormal in {str(dtype).removeprefix('torch.')}"
    return None
