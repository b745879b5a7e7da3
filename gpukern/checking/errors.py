from __future__ import annotations


class CheckError(RuntimeError):
    """The model cannot be checked."""
