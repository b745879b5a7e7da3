"""``docs/adding-an-operation.md`` names the files that an activation is in."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_an_activation_is_in_the_files_that_are_named():
    page = (ROOT / "docs" / "adding-an-operation.md").read_text()
    named = re.findall(r"^\| \d+ \| `([\w/.]+)` \|", page, re.MULTILINE)
    assert len(named) == len(set(named)) <= 12
    assert all((ROOT / name).is_file() for name in named)
    # Another activation. Summaries and diagnoses have the names of all of torch's, whether gpukern has them or not.
    entered = {path for path in (ROOT / "gpukern").rglob("*.py") if re.search("hardswish", path.read_text(), re.I)}
    entered -= {ROOT / "gpukern" / name for name in ("summary/views.py", "diagnose/activation_kinds.py")}
    assert {str(path.relative_to(ROOT)) for path in entered} == {name for name in named if name.startswith("gpukern/")}
