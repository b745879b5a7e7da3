"""Images a second and latencies, in every form of the report."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from bench.report import markdown, page, terminal
from bench.report.summary import summarize
from bench.report.throughput import throughputs
from bench.results import Results, Use
from tests.bench import made_up

SAMPLES = [float(n) for n in range(1000, 1100)]


def network(**others) -> Results:
    of = made_up.case(
        "A net, 64×3×8×8", suite="inference", sizes={"network": "net"}, batch=64, uses=(Use("net", "", 1),)
    )
    peers = {
        "slower": {"graph": [2 * s for s in SAMPLES], "eager": SAMPLES[:9]},
        "faster": {"graph": [s / 2 for s in SAMPLES]},
        "broken": "wrong",
    }
    return made_up.results([made_up.row({"graph": SAMPLES, "eager": SAMPLES[:7]}, peers, of=of, **others)])


def tables() -> dict[str, list[list[str]]]:
    (group,) = summarize(network())
    return {title: [row.cells for row in rows] for title, rows in throughputs(group)}


def test_every_candidate_that_is_right_has_its_line_gpukern_first():
    found = tables()
    assert found["CUDA graph"] == [
        ["net", "gpukern", "60,981", "1,050", "1,098", "–", "–"],
        ["net", "faster", "121,963", "524.8", "549.0", "0.50×", "0.50–0.50"],
        ["net", "slower", "30,491", "2,099", "2,196", "2.00×", "2.00–2.00"],
    ]


def test_each_way_of_timing_has_its_table():
    eager = tables()["calls from Python"]
    # Samples of different rounds make no ratio, and who was not timed so is not there.
    assert [row[1] for row in eager] == ["gpukern", "slower"] and eager[1][-2:] == ["–", "–"]
    assert list(tables()) == ["CUDA graph", "calls from Python"]


@pytest.mark.parametrize("theirs, code", [(500.0, 31), (1000.0, 33), (2000.0, 32)], ids=["loss", "tie", "win"])
def test_ratios_are_coloured_by_outcome(theirs, code):
    of = made_up.case("x", sizes={"network": "net"}, batch=1)
    found = made_up.results([made_up.row({"graph": [1000.0] * 8}, {"peer": {"graph": [theirs] * 8}}, of=of)])
    out = io.StringIO()
    terminal.show(found, Console(file=out, width=120, force_terminal=True, color_system="standard"))
    (line,) = (line for line in out.getvalue().splitlines() if "peer" in line and f"{1e6 / theirs:,.0f}" in line)
    assert f"\x1b[{code}m{theirs / 1000:.2f}×" in line
    outcome = {31: "loss", 32: "win", 33: "tie"}[code]
    assert f'<td class="{outcome}">{theirs / 1000:.2f}×' in page.render([(Path("a"), found)])


def test_layers_compute_no_images_and_a_network_is_no_sum_of_layers():
    (group,) = summarize(network())
    assert group.totals == ()
    for group in summarize(made_up.run()):
        assert throughputs(group) == []


@pytest.mark.parametrize("form", ["terminal", "markdown", "page"])
def test_it_is_in_every_form(form):
    found = network()
    if form == "terminal":
        out = io.StringIO()
        terminal.show(found, Console(file=out, width=terminal.WIDE))
        text = out.getvalue()
    else:
        text = markdown.render(found) if form == "markdown" else page.render([(Path("a"), found)])
    for expected in ("images/s", "p99", "60,981", "121,963", "0.50–0.50", "calls from Python"):
        assert expected in text, expected


def test_when_gpukern_is_not_ok_the_others_are_still_there():
    of = made_up.case("x", sizes={"network": "net"}, batch=1)
    (group,) = summarize(made_up.results([made_up.row("failed", {"peer": {"graph": SAMPLES}}, of=of)]))
    ((_, (row,)),) = throughputs(group)
    assert row.candidate == "peer" and row.ratio is None
