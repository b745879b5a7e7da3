"""The bar of long loops."""

from __future__ import annotations

import pytest
from rich.console import Console

from models import progress


@pytest.mark.parametrize("terminal", [True, False])
def test_items_pass_and_the_bar_is_for_terminals(terminal, monkeypatch, capsys):
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(stderr=stderr, force_terminal=terminal, width=60))
    assert list(progress.tracked([3, 4], "borders")) == [3, 4]
    assert ("borders" in capsys.readouterr().err) == terminal
    assert list(progress.tracked([3, 4], "borders", shown=False)) == [3, 4]
    assert not capsys.readouterr().err
    # Two bars at once do not disturb each other.
    assert [list(progress.tracked("ab", "inner")) for _ in progress.tracked([0, 1], "outer")] == [["a", "b"]] * 2
