"""What fusing raises."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpukern.fuse.report import FusionReport


class FusionError(RuntimeError):
    """The model cannot be captured, or what came out does not compute what it did.

    ``report``: where the verification failed, what was fused, and the error of each group; else None.
    """

    def __init__(self, message: str, report: FusionReport | None = None) -> None:
        super().__init__(message)
        self.report = report
