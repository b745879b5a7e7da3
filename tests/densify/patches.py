"""Patch by patch: what dense networks are compared with, and how near they must come to it.

Rounding errors are proportional to the unit of rounding. That of a classifier in float32 is measured, as its distance
from itself in float64; a dense network of a dtype sums the same terms in another order, which changes the rounding
errors, but not their size: it gets eight times as much, the largest of all elements, in units of the dtype. Two
roundings of the largest result are added for where float32 happens to be exact.
"""

from __future__ import annotations

import copy

import torch

FACTOR = 8.0


def patches_of(image: torch.Tensor, patch: tuple[int, int]) -> torch.Tensor:
    """Every patch of [N, C, H, W], row by row: [N·P·Q, C, h, w]."""
    windows = image.unfold(2, patch[0], 1).unfold(3, patch[1], 1)  # [N, C, P, Q, h, w]
    return windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, image.shape[1], *patch)


def by_patches(model: torch.nn.Module, image: torch.Tensor, patch: tuple[int, int]) -> torch.Tensor:
    """``model`` on every patch of ``image``: [N, K, P, Q]."""
    rows, columns = image.shape[2] - patch[0] + 1, image.shape[3] - patch[1] + 1
    results = model(patches_of(image, patch)).flatten(1)
    return results.view(len(image), rows, columns, -1).permute(0, 3, 1, 2)


def assert_equals_patches(
    network: torch.nn.Module, model: torch.nn.Module, image: torch.Tensor, dtype: torch.dtype
) -> None:
    """``network``, of ``dtype``, gives for ``image`` what ``model`` does in float64 for every patch."""
    with torch.no_grad():
        exact = by_patches(copy.deepcopy(model).double(), image.double().cpu(), network.patch_size)
        rounded = by_patches(copy.deepcopy(model).float(), image.float().cpu(), network.patch_size)
        result = network(image)
    error, unit = (rounded.double() - exact).abs().max().item(), torch.finfo(dtype).eps
    allowed = FACTOR * error * unit / torch.finfo(torch.float32).eps + 2 * unit * exact.abs().max().item()
    assert result.shape == exact.shape
    assert result.dtype is dtype
    assert (result.cpu().double() - exact).abs().max().item() <= allowed
