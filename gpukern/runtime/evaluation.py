"""The mode of models that are not the user's own to change."""

from __future__ import annotations

import contextlib

import torch


def evaluate(model: torch.nn.Module) -> torch.nn.Module:
    """``model`` in evaluation mode. What torch.export captured stays in the mode of its capture: it refuses another."""
    with contextlib.suppress(NotImplementedError):
        model.eval()
    return model
