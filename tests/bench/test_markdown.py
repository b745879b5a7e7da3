"""The Markdown of a run, parsed as GitHub's tables are."""

from __future__ import annotations

import re

import pytest

from bench.report import markdown
from tests.bench import made_up
from tests.bench.made_up import results, row


def tables(text: str) -> list[list[list[str]]]:
    """Cells of each table; a bar behind a backslash divides nothing."""
    found = []
    for block in re.split(r"\n\n+", text):
        if block.startswith("| "):
            found.append([re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()])
    return [[[cell.strip() for cell in line] for line in table] for table in found]


@pytest.fixture(scope="module")
def text() -> str:
    return markdown.render(made_up.run(), "bench/results/made-up/a.json")


def test_every_line_of_a_table_has_as_many_cells(text):
    for table in tables(text):
        assert len({len(line) for line in table}) == 1


def test_the_headline_has_a_line_for_each_group(text):
    headline = tables(text)[0]
    head, _, *lines = headline
    assert head[:7] == ["suite", "computation", "dtype", "layout", "batch", "rows", "best peer"]
    assert [line[:6] for line in lines] == [
        ["model", "training step", "float16", "channels_last", "32", "1"],
        ["conv", "forward", "float16", "channels_last", "32", "16, 1 not ok"],
        ["conv", "weight gradient", "float16", "channels_last", "32", "16, 1 not ok"],
        ["pool", "forward", "float32", "NCHW", "32", "4"],
    ]
    by_peer = dict(zip(head, lines[3], strict=True))
    assert by_peer["torch"] == by_peer["best peer"] != "–" and by_peer["cuDNN NCHW"] == "–"
    means = [float(re.match(r"\*\*([\d.]+)×", line[6])[1]) for line in lines]
    assert means == sorted(means)


def test_every_row_is_in_its_block_losers_first(text):
    assert text.count("<details>") == text.count("</details>") == len(tables(text)) - 1 == 4
    assert sum(len(table) - 2 for table in tables(text)[1:]) == len(made_up.run().rows)
    forward = tables(text)[2]
    assert forward[2][1] == "**wrong**"
    ratios = [float(re.search(r"\*\*([\d.]+)×", line[2])[1]) for line in forward[3:]]
    assert ratios[0] < 0.8 and ratios[-1] > 1.5


def test_the_evidence_is_one_line(text):
    (line,) = [line for line in text.splitlines() if line.startswith("device:")]
    for part in ("Made-up GPU", "driver 0.4", "torch 0.0.1", "cudnn.benchmark=True", "commit 2222222bb"):
        assert part in line
    assert "file: `bench/results/made-up/a.json`" in line


def test_nothing_from_a_file_is_markup(text):
    assert "<script>" not in text and "<b>net" not in text
    reason = r'BackendError: &lt;script&gt;alert("no")&lt;/script&gt; \| \[bold\]\*\*x\*\*\[/bold\] \`y\` at line 1'
    assert reason in text
    assert markdown.escape("channels_last _x_ a\n~b #1 $2$ \\") == r"channels_last \_x\_ a \~b \#1 \$2\$ \\"
    (body,) = [t for t in tables(markdown.render(results([row(10.0, {"a|b": 9.0}, problem="1|2\n| 3")])))][1:]
    assert body[0][2] == r"a\|b µs" and body[2][0] == r"1\|2 \| 3"


def test_an_empty_run_is_no_error():
    assert "Made-up GPU" in markdown.render(results([]))
