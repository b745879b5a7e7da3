"""What ``pip install`` brings: every file beside the modules is named in ``pyproject.toml``."""

from __future__ import annotations

import ast
import fnmatch
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_files_beside_modules_are_packaged():
    (patterns,) = re.findall(
        r"^\[tool\.setuptools\.package-data\]\ngpukern = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    package = ROOT / "gpukern"
    files = [path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()]
    data = [name for name in files if not name.endswith((".py", ".pyc"))]
    assert "py.typed" in data
    for name in data:
        assert any(fnmatch.fnmatch(name, pattern) for pattern in ast.literal_eval(patterns)), name


def test_versions_of_the_checks_are_pinned():
    """So that CI and a contributor's machine cannot disagree, and ``make lint`` says the same next year."""
    constraints = (ROOT / "constraints.txt").read_text()
    for entry in re.findall(r"entry: \.venv/bin/(\w+)", (ROOT / ".pre-commit-config.yaml").read_text()):
        assert re.search(rf"^{entry}==[\d.]+$", constraints, re.MULTILINE), entry
