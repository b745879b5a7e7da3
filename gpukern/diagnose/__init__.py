"""Diagnosis of a training: what the layers do, what is wrong before it begins, and which settings to take."""

from __future__ import annotations

from gpukern.diagnose.activations import activation_statistics, watch_activations
from gpukern.diagnose.errors import DiagnoseError, MissingPackage

__all__ = [
    "DiagnoseError",
    "MissingPackage",
    "activation_statistics",
    "watch_activations",
]
