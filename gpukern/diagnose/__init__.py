"""Diagnosis of a training: what the layers do, what is wrong before it begins, and which settings to take."""

from __future__ import annotations

from gpukern.diagnose.activations import activation_statistics, watch_activations
from gpukern.diagnose.classified import confusion, misclassified
from gpukern.diagnose.curves import plot_training
from gpukern.diagnose.errors import DiagnoseError, MissingPackage
from gpukern.diagnose.images import plot_filters
from gpukern.diagnose.rates import RangeTest, learning_rate_range_test
from gpukern.diagnose.saliency_maps import saliency
from gpukern.diagnose.sanity import SanityReport, sanity_check
from gpukern.diagnose.search_report import SearchReport
from gpukern.diagnose.searching import search
from gpukern.diagnose.space import choice, integers, log_uniform, uniform

__all__ = [
    "DiagnoseError",
    "MissingPackage",
    "RangeTest",
    "SanityReport",
    "SearchReport",
    "activation_statistics",
    "choice",
    "confusion",
    "integers",
    "learning_rate_range_test",
    "log_uniform",
    "misclassified",
    "plot_filters",
    "plot_training",
    "saliency",
    "sanity_check",
    "search",
    "uniform",
    "watch_activations",
]
