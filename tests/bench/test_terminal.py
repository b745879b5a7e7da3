"""The tables of a run on a terminal and in a pipe."""

from __future__ import annotations

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from bench import report
from bench.report import terminal
from tests.bench import made_up
from tests.bench.made_up import results, row


def printed(shown, width: int = terminal.WIDE, colour: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=colour, color_system="standard" if colour else None)
    terminal.show(shown, console)
    return out.getvalue()


def words_of(text: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;]*m", "", text).split()


@pytest.mark.parametrize("width", [100, 110, 120, terminal.WIDE])
def test_it_fits_and_cuts_nothing_off(width):
    text = printed(made_up.run(), width)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    for whole in ("channels_last", "torch.compile", "memory", "compute", "layer1.1.conv2", "missing"):
        assert whole in words_of(text), whole
    ok = [made for made in made_up.run().rows if made.candidates[0].status == "ok"]
    assert len(re.findall(r"\d ±\d", text)) == len(ok)
    # As many rows end with what bounds them as there are.
    assert len(re.findall(r"(memory|compute) *$", text, re.MULTILINE)) == len(made_up.run().rows)


def test_more_peers_than_fit_get_a_table_more():
    peers = {f"peer{i}": {"graph": [10.0 + i] * 8} for i in range(9)}
    text = printed(results([row({"graph": [10.0] * 8}, peers)]), 100)
    assert max(cell_len(line) for line in text.splitlines()) <= 100
    assert [name for name in peers if words_of(text).count(name) < 2] == []
    assert [i for i in range(9) if f"{10 + i}.00 {1 + i / 10:.2f}×" not in text] == []


def test_numbers_never_break():
    table = terminal.new_table("", "", ["layer", "gpukern µs"])
    table.add_row("a", "123,456 ±1,234 eager")
    out = io.StringIO()
    Console(file=out, width=24).print(table)
    assert "123,456 ±1,234 eager" in out.getvalue()


def test_each_row_says_time_ratio_limit_and_bound():
    ours, theirs = [10.0, 10.2] * 6, [20.0, 20.4] * 6
    text = printed(results([row({"graph": ours}, {"peer": {"graph": theirs}}, flops=5e8)]))
    (line,) = [line for line in text.splitlines() if line.strip().startswith("a problem")]
    assert line.split("a problem")[1].split() == ["10.10", "±0.10", "20.20", "2.00×", "50%", "compute"]
    assert "geometric mean 2.00×, 1 win, 0 losses, 0 ties" in text


@pytest.mark.parametrize("theirs, code", [(5.0, 31), (10.0, 33), (20.0, 32)], ids=["loss", "tie", "win"])
def test_ratios_are_coloured_by_outcome(theirs, code):
    text = printed(results([row({"graph": [10.0] * 8}, {"peer": {"graph": [theirs] * 8}})]), 100, colour=True)
    assert f"\x1b[{code}m {report.ratio(theirs / 10)}" in text


def test_what_is_not_ok_is_shown_with_its_reason():
    text = " ".join(words_of(printed(made_up.run())))
    assert "gpukern wrong (resnet50 layer2.1.conv3 ×3 …): error 2.5e-01, bound 1.0e-03" in text
    # One line, and neither markup of rich nor control characters of a message do anything.
    reason = 'BackendError: <script>alert("no")</script> | [bold]**x**[/bold] `y` at line 1'
    assert f"gpukern failed (resnet50 layer2.2.conv1): {reason}" in text
    assert f"torch.compile failed (resnet50 layer1.3.conv1): {reason}" in text
    assert "FlagGems missing (16 rows): flag_gems is not installed" in text
    assert "torch.compile note (15 rows): no graph timing: made up" in text
    assert "\x1b" not in printed(results([row(10.0, {"\x1b[31mred": 9.0}, problem="\x1b[31mred")]))


def test_losers_first():
    text = printed(made_up.run())
    shown = [text.index(layer) for layer in ("wrong ", "0.72×", "1.04×", "1.60×")]
    assert shown == sorted(shown)


def test_the_header_says_where_and_on_what():
    text = " ".join(words_of(printed(made_up.run(modified=True))))
    for part in ("Made-up GPU", "copy 1,000 GB/s", "driver 0.4", "torch 0.0.1", "cudnn.benchmark=True", "rounds 21"):
        assert part in text
    assert "commit 2222222bb with changes" in text


def test_a_pipe_gets_plain_wide_text(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    terminal.show(made_up.run())
    text = capsys.readouterr().out
    assert "\x1b" not in text and "cuDNN channels_last" in text
    assert 100 < max(map(cell_len, text.splitlines())) <= terminal.WIDE


def test_an_empty_run_is_no_error():
    assert "Made-up GPU" in printed(results([]))
