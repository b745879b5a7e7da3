"""All operators of gpukern, each declared once, beside its computation."""

from __future__ import annotations

import importlib
import pkgutil

from gpukern import ops
from gpukern.runtime.operator import OPERATORS

__all__ = ["OPERATORS"]

for _module in pkgutil.iter_modules(ops.__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"gpukern.ops.{_module.name}")
