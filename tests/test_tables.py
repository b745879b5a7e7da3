"""One look for every table: words to the left, numbers to the right, nothing cut off in a pipe."""

from __future__ import annotations

import pytest
from rich.console import Console
from rich.text import Text

from gpukern import tables
from gpukern.tables import Column, as_text, numbers, pairs, table


def filled(**given):
    made = table("layer", *numbers("µs", "error of the output"), title="times", caption="of a call", **given)
    made.add_row("conv1", "1.23", "4.1e-04")
    made.add_row("fully connected", "12,345", "–")
    return made


def test_a_table_is_text_with_words_left_and_numbers_right():
    assert as_text(filled()).splitlines() == [
        "times",
        "",
        " layer                 µs   error of the output",
        " ──────────────────────────────────────────────",
        " conv1               1.23               4.1e-04",
        " fully connected   12,345                     –",
        "",
        "of a call",
    ]


def test_headings_of_a_narrow_table_break_and_its_numbers_do_not():
    text = as_text(filled(narrow=True), width=36)
    assert "error of the\n" in text and "\n layer" in text
    assert "12,345" in text and "4.1e-04" in text


def test_totals_stand_below():
    made = table("layer", Column("parameters", total="1,234"))
    made.add_row("conv1", "34")
    assert [line.split() for line in as_text(made).splitlines()[-2:]] == [[], ["1,234"]]


def test_pairs_hold_text_and_styled_text():
    shown = pairs([("device", "[bold]H200"), ("missing", Text("CuPy", style="yellow"))])
    assert as_text(shown) == "device   [bold]H200\nmissing  CuPy"


def test_nothing_is_cut_off_in_a_pipe():
    assert as_text(Text("x" * 170)) == "x" * 170


@pytest.mark.parametrize("terminal", [True, False])
def test_colours_are_for_terminals(terminal, monkeypatch, capsys):
    monkeypatch.setattr(tables, "Console", lambda **given: Console(**{"force_terminal": terminal, **given}))
    tables.show(Text("ok", style="green"))
    assert ("\x1b[32m" in capsys.readouterr().out) is terminal
