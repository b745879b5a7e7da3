"""What fusing raises, and what it says of the errors of others."""

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


def first_line(error: Exception) -> str:
    """The kind of an error and the line of its message that tells most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Data-dependent control flow is explained below the code.
    told = next((line for line in lines if line.startswith(("Could not guard", "Constraints violated"))), None)
    return f"{type(error).__name__}: {told or next(iter(lines), '')}"
