"""Fusing a trained model for inference: see :func:`fuse`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gpukern.fusion.api import fuse, load
from gpukern.fusion.errors import FusionError

if TYPE_CHECKING:
    from gpukern.fusion.model import FusedModel
    from gpukern.fusion.report import FusionReport

__all__ = ["FusedModel", "FusionError", "FusionReport", "fuse", "load"]

#: Imported at the first use: ``import gpukern`` shall not wait for them.
_LATER = {"FusedModel": "gpukern.fusion.model", "FusionReport": "gpukern.fusion.report"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
