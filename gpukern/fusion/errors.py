"""Exceptions and warnings of fusing, and summaries of other errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpukern.fusion.report import FusionReport


class FusionError(RuntimeError):
    """The model cannot be captured, or the fused model does not compute the same.

    ``report``: where the verification failed, what was fused, and the error of each group; else None.
    """

    def __init__(self, message: str, report: FusionReport | None = None) -> None:
        super().__init__(message)
        self.report = report


class SourceError(ValueError):
    """There is no such model, or a file does not hold the requested content."""


class WeightsError(SourceError):
    """A file of weights cannot be read, holds no weights, or holds those of another model."""


class WeightsWarning(UserWarning):
    """One of several states in a file was taken, or some of its tensors were left out."""


def first_line(error: Exception) -> str:
    """Return the kind of an error and the most informative line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Data-dependent control flow is explained below the code.
    told = next((line for line in lines if line.startswith(("Could not guard", "Constraints violated"))), None)
    return f"{type(error).__name__}: {told or next(iter(lines), '')}"
