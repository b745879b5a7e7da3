"""Sequences [N, C, L] as images [N, C, 1, L], without a copy."""

from __future__ import annotations

from typing import Any

import torch


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """[N, C, L] as [N, C, 1, L]; one whose channels are adjacent is then in channels_last."""
    return tensor.unsqueeze(2)


def sequence(images: torch.Tensor) -> torch.Tensor:
    """Invert :func:`rows`."""
    return images.squeeze(2)


def fresh_sequence(images: torch.Tensor) -> torch.Tensor:
    """:func:`sequence` of a tensor that nobody else has, which is changed itself.

    Autograd lets nobody change the result of a function that is a view, as an activation in place does.
    """
    return images.squeeze_(2)


def without_layout(tensor: torch.Tensor) -> torch.Tensor:
    """:func:`rows` with strides that are never taken for channels_last.

    The result of torch's 1-D convolutions is in the layout of the weight, whatever that of the input.
    """
    N, C, L = tensor.shape
    n, c, step = tensor.stride()
    return tensor.as_strided((N, C, 1, L), (n, c, 0, step))


class Rows:
    """An autograd context whose saved sequences are images."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    @property
    def saved_tensors(self) -> tuple[torch.Tensor | None, ...]:
        saved = self._ctx.saved_tensors
        return tuple(rows(tensor) if tensor is not None and tensor.dim() == 3 else tensor for tensor in saved)
