"""Diagnosis of a training: what the layers do, what is wrong before it begins, and which settings to take."""

from __future__ import annotations

from gpukern.diagnose.activations import activation_statistics, watch_activations
from gpukern.diagnose.classified import confusion, misclassified
from gpukern.diagnose.curves import plot_training
from gpukern.diagnose.errors import DiagnoseError, MissingPackage
from gpukern.diagnose.images import plot_filters
from gpukern.diagnose.saliency_maps import saliency
from gpukern.diagnose.sanity import SanityReport, sanity_check

__all__ = [
    "DiagnoseError",
    "MissingPackage",
    "SanityReport",
    "activation_statistics",
    "confusion",
    "misclassified",
    "plot_filters",
    "plot_training",
    "saliency",
    "sanity_check",
    "watch_activations",
]
