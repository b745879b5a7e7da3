"""Convolutions of volumes that are convolutions of images, through views: the families of the engine compute them.

- R = S = 1, no stride or padding in the plane: images of D rows and H·W columns, in either layout.
- T = 1, no stride or padding in depth: N·D images, where the batch and the planes are one dimension, as in
  channels_last_3d.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from gpukern.conv.plan import Direction
from gpukern.conv.problem import ConvProblem
from gpukern.conv.volumes.problem import VolumeProblem
from gpukern.runtime.strides import dense_strides


class Images(NamedTuple):
    """The same convolution of images; ``residual`` is None if there is none."""

    problem: ConvProblem
    first: torch.Tensor
    second: torch.Tensor
    output: torch.Tensor
    residual: torch.Tensor | None


def images_of(
    p: VolumeProblem,
    direction: Direction,
    first: torch.Tensor,
    second: torch.Tensor,
    output: torch.Tensor,
    residual: torch.Tensor | None,
    channels_last: bool,
) -> Images | None:
    """Return the convolution of images with its operands as views; None if it is none, or strides allow no views."""
    problem, planes_are_rows = _problem_of(p)
    if problem is None:
        return None
    view = _rows_and_columns if planes_are_rows else _batch_of_planes
    if direction is Direction.WEIGHT_GRAD:
        views = [view(first), view(second), _filter(output, planes_are_rows), None]
    else:
        views = [view(first), _filter(second, planes_are_rows), view(output), None]
        views[3] = None if residual is None else view(residual)
    if any(each is None for each in views[:3]) or (residual is not None and views[3] is None):
        return None
    images = Images(problem, *views)  # type: ignore[arg-type]
    wanted = dense_strides(images.output.shape, channels_last)
    given = zip(images.output.shape, images.output.stride(), wanted, strict=True)
    return images if all(size == 1 or stride == own for size, stride, own in given) else None


@functools.lru_cache(maxsize=4096)
def _problem_of(p: VolumeProblem) -> tuple[ConvProblem | None, bool]:
    """Return (the convolution of images, whether planes are its rows and not its batch)."""
    (D, H, W), (T, R, S), (Z, P, Q) = p.image, p.taps, p.result
    front, back, *around = p.padding
    if R == S == 1 and p.stride[1:] == (1, 1) and not any(around):
        padding, stride, dilation = (front, back, 0, 0), (p.stride[0], 1), (p.dilation[0], 1)
        return ConvProblem(p.N, p.C, D, H * W, p.K, T, 1, Z, P * Q, stride, padding, dilation, p.groups), True
    if T == p.stride[0] == 1 and not (front or back):
        top, bottom, left, right = around
        return ConvProblem(
            p.N * D, p.C, H, W, p.K, R, S, P, Q, p.stride[1:], (top, bottom, left, right), p.dilation[1:], p.groups
        ), False  # fmt: skip
    return None, False


def _rows_and_columns(tensor: torch.Tensor) -> torch.Tensor | None:
    return _joined(tensor, 3)


def _batch_of_planes(tensor: torch.Tensor) -> torch.Tensor | None:
    return _joined(tensor.transpose(1, 2), 0)


def _filter(tensor: torch.Tensor, planes_are_rows: bool) -> torch.Tensor:
    return tensor.select(4 if planes_are_rows else 2, 0)


def _joined(tensor: torch.Tensor, at: int) -> torch.Tensor | None:
    """Return a view in which dimension ``at`` and the next are one; None if there is no such view."""
    shape, strides = tensor.shape, tensor.stride()
    if shape[at] != 1 and shape[at + 1] != 1 and strides[at] != shape[at + 1] * strides[at + 1]:
        return None
    step = strides[at] if shape[at + 1] == 1 else strides[at + 1]
    sizes = (*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :])
    return tensor.as_strided(sizes, (*strides[:at], step, *strides[at + 2 :]))
