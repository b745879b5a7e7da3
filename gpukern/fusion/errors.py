"""What fusing raises."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpukern.fusion.report import FusionReport


class FusionError(RuntimeError):
    """The model cannot be captured, or what came out does not compute what it did.

    ``report``: where the verification failed, what was fused, and the error of each group; else None.
    """

    def __init__(self, message: str, report: FusionReport | None = None) -> None:
        super().__init__(message)
        self.report = report


class SourceError(ValueError):
    """There is no such model, or a file does not hold what is wanted of it."""


class WeightsError(SourceError):
    """A file of weights cannot be read, holds no weights, or holds those of another model."""


class WeightsWarning(UserWarning):
    """Of several states in a file one was taken, or some of its tensors were left out."""
