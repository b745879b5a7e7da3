"""Evaluation mode for models whose own mode must not change."""

from __future__ import annotations

import contextlib

import torch


def evaluate(model: torch.nn.Module) -> torch.nn.Module:
    """``model`` in evaluation mode. A program captured by torch.export keeps its mode: it refuses to change."""
    with contextlib.suppress(NotImplementedError):
        model.eval()
    return model
