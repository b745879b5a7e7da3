from __future__ import annotations


class DiagnoseError(RuntimeError):
    """The model cannot be diagnosed: it fails, has no copy, or nothing in it can be judged."""


class MissingPackage(ImportError):
    """A package of the extra ``train`` is not installed."""
