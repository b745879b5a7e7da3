"""Packages that only some functions need: imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from gpukern.diagnose.errors import MissingPackage


def needed(module: str, purpose: str) -> Any:
    """Import ``module``. MissingPackage, which names the extra to install, where its package is not installed."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as problem:
        if problem.name != package:
            raise
        raise MissingPackage(
            f"{package} is not installed, which {purpose} needs: pip install 'gpukern[train]'", name=package
        ) from None
