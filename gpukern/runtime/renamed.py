"""Packages under the names that they had before: imports written for an earlier version keep working."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def keep_old_name(old: str, package: ModuleType) -> None:
    """Make ``old`` another name of ``package``, and ``old.x`` of each of its modules x: the same objects, not copies.

    An attribute of that name in the parent, such as a function, stays what it is.
    """
    sys.modules[old] = package
    # First, because the finder of paths would load the file of old.x a second time.
    sys.meta_path.insert(0, _Renamed(f"{old}.", f"{package.__name__}."))


class _Renamed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        new = self._new + name.removeprefix(self._old)
        if not name.startswith(self._old) or importlib.util.find_spec(new) is None:
            return None
        return ModuleSpec(name, self, origin=new)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(str(spec.origin))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Put back what the import system took for the module's new specification."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state
