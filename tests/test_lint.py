"""What ``make lint`` and the hooks of pre-commit run."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_versions_of_the_checks_are_pinned():
    """So that CI and a contributor's machine cannot disagree, and ``make lint`` says the same next year."""
    constraints = (ROOT / "constraints.txt").read_text()
    entries = set(re.findall(r"entry: \.venv/bin/(\w+)", (ROOT / ".pre-commit-config.yaml").read_text()))
    assert entries == set(re.findall(r"\$\(BIN\)/(\w+)", _recipe("lint")))
    for entry in entries:
        assert re.search(rf"^{entry}==[\d.]+$", constraints, re.MULTILINE), entry


def _recipe(target: str) -> str:
    makefile = (ROOT / "Makefile").read_text()
    (recipe,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    return recipe
