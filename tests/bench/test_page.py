"""The HTML page: whole, safe, the same every time, and what Chromium makes of it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from bench import report
from bench.report import page, plots
from bench.report.summary import summarize
from bench.results import Ceilings
from tests.bench import made_up
from tests.bench.made_up import results, row
from tests.browser import Parsed, chromium, needs_browser


def files(speeds=(0.8, 1.0)) -> list[tuple[Path, object]]:
    commits = [made_up.OLD, "3333333cccc", made_up.NEW]
    runs = [
        (Path(f"results/{i}.json"), made_up.run(speed, commit=commits[i], date=f"2001-01-0{i + 1}", driver=f"0.{i}"))
        for i, speed in enumerate(speeds)
    ]
    return runs


@pytest.fixture(scope="module")
def html() -> str:
    return page.render(files())


@pytest.fixture(scope="module")
def parsed(html) -> Parsed:
    return Parsed(html)


def test_it_is_well_formed_and_its_links_lead_somewhere(parsed):
    ids = parsed.values("id")
    assert len(ids) == len(set(ids))
    links = parsed.values("href")
    assert links and {link[1:] for link in links} <= set(ids) and all(link.startswith("#") for link in links)


def test_it_asks_for_nothing_else(html, parsed):
    assert not re.search(r"https?:|//[a-z]|@import|url\(", html)
    assert not parsed.values("src") and "link" not in {tag for tag, _ in parsed.elements}
    assert "default-src 'none'" in html


def test_every_row_and_candidate_is_there(parsed):
    rows = [attributes for tag, attributes in parsed.elements if tag == "tr" and "data-row" in attributes]
    run = made_up.run()
    assert len(rows) == len(run.rows)
    for made in run.rows:
        assert made.case.problem in parsed.words
        assert all(name in parsed.words for name in report.use_names(made.case))
    for made in run.rows:
        for candidate in made.candidates:
            assert candidate.name in parsed.words and candidate.setting in parsed.words
            if candidate.status in ("wrong", "failed"):
                assert report.reason(candidate, made) in parsed.words


def test_a_bar_and_a_dot_for_each_row_with_a_ratio(parsed):
    compared = [made for made in made_up.run().rows if made.candidates[0].status == "ok"]
    bars = [attributes for tag, attributes in parsed.elements if attributes.get("class") == "bar"]
    assert len(bars) == len(compared)
    # The best peer may be one that was timed otherwise than the rest: the bar says how.
    timings = [next(t for t in report.TIMINGS.values() if f"({t})" in bar["title"]) for bar in bars]
    assert set(timings) == {"CUDA graph", "calls from Python"}
    assert all("95 % interval" in bar["title"] for bar in bars)
    history = 2 * 4
    dots = [attributes for tag, attributes in parsed.elements if tag == "circle"]
    with_arithmetic = sum(made.flops > 0 for made in compared)
    assert len(dots) == 2 * with_arithmetic + history
    assert "1 row without arithmetic not shown" in parsed.words


def test_losers_first(parsed):
    forward = parsed.words.split("Row by row")[1].split("conv · forward")[1]
    ratios = [float(value) for value in re.findall(r"([\d.]+)×", forward.split("95 % interval")[1])[:60]]
    bars = [value for value in ratios if value in (0.72, 0.93, 1.3, 1.6)]
    assert bars == sorted(bars) and bars[0] == 0.72 and bars[-1] == 1.6


def test_nothing_from_a_file_is_markup(html, parsed):
    assert "alert(" not in "".join(re.findall(r"<script>.*?</script>", html, re.DOTALL))
    assert '<script>alert("no")</script>' in parsed.words and "a <b>net</b> pool0" in parsed.words
    evil = '"><img src=x onerror=alert(1)>'
    run = results([row(10.0, {evil: 9.0}, problem=evil, suite=evil)], device=evil, torch=evil)
    shown = Parsed(page.render([(Path(evil), run)]))
    assert "img" not in {tag for tag, _ in shown.elements}
    assert shown.words.count(evil) > 7


def test_the_same_files_give_the_same_bytes_in_any_order(html):
    assert page.render(files()) == html
    assert page.render(list(reversed(files()))) == html


def test_tables_show_the_newest_run_and_the_history_all():
    old, new = made_up.run(0.5, commit=made_up.OLD, date="2001-01-01"), made_up.run(1.0, date="2001-01-02")
    pools_only = dataclasses.replace(old, rows=tuple(r for r in old.rows if r.case.suite == "pool"))
    newest = dataclasses.replace(new, rows=tuple(r for r in new.rows if r.case.suite != "pool"))
    parsed = Parsed(page.render([(Path("new.json"), newest), (Path("old.json"), pools_only)]))
    # Each is the newest of a suite, and both say what they are.
    assert "old.json" in parsed.words and "new.json" in parsed.words and "Over commits" not in parsed.words
    parsed = Parsed(page.render([(Path("new.json"), new), (Path("old.json"), old)]))
    assert "old.json" not in parsed.words
    points = re.findall(r"(\w+), (2001-01-0\d): ([\d.]+)× over", " ".join(parsed.text))
    assert [point[:2] for point in points] == [("1111111aa", "2001-01-01"), ("2222222bb", "2001-01-02")] * 4
    assert all(float(new[2]) > 1.5 * float(before[2]) for before, new in zip(points[::2], points[1::2], strict=True))


def test_a_change_of_the_setup_is_named_with_the_history(parsed):
    assert "1111111aa to 3333333cc: driver 0.0 → 0.1" in parsed.words


def test_each_device_has_a_section():
    runs = [(Path("a"), made_up.run()), (Path("b"), made_up.run(device="Another GPU"))]
    parsed = Parsed(page.render(runs))
    assert sum(attributes.get("class") == "device" for _, attributes in parsed.elements) == 2
    assert "Another GPU" in parsed.words


def test_nothing_measured_yet():
    assert "No runs were given" in Parsed(page.render([])).words
    assert "Made-up GPU" in Parsed(page.render([(Path("a"), results([]))])).words
    bad = results([row("failed", {"peer": 1.0}), row(10.0, problem="alone")])
    assert "1 row of gpukern itself not ok" in Parsed(page.render([(Path("a"), bad)])).words


def test_bars_start_at_one_and_end_at_the_ratio():
    rows = [row({"graph": [10.0] * 8}, {"p": {"graph": [t] * 8}}, problem=str(t)) for t in (5.0, 20.0, 10_000.0)]
    (group,) = summarize(results(rows[:2]))
    (left, width), fast = (plots.bars(group.lines).span(1, line.best.median) for line in group.lines)
    assert left + width == pytest.approx(50) and fast == (50, pytest.approx(width))
    (group,) = summarize(results(rows))
    assert plots.bars(group.lines).span(1, 1000) == (50, 50), "beyond the edge"


def test_a_dot_on_the_ceiling_lies_on_its_line():
    # 100 TFLOP/s are the ceiling from 200 FLOP/byte on, half a TB/s before.
    ceilings = Ceilings(0.5e12, {"float16": 100e12, "float32": 1.0})
    at_peak = row({"graph": [10.0] * 8}, flops=1e9, bytes_=1e6, problem="compute")
    at_copy = row({"graph": [10.0] * 8}, flops=1e8, bytes_=5e6, problem="memory")
    (group,) = summarize(results([at_peak, at_copy]))
    chart = plots.roofline(group.lines, ceilings)

    def place(point):
        return chart.x.at(point[0]), chart.y.down(point[1])

    # One of another kind than the rows' has no place in it.
    slope, flat = ((place(ceiling.start), place(ceiling.end)) for ceiling in chart.ceilings)
    dots = {dot.line.row.case.problem: place((dot.intensity, dot.rate)) for dot in chart.dots}
    assert dots["compute"][1] == flat[0][1] == flat[1][1] == slope[1][1]
    x, y = dots["memory"]
    (x1, y1), (x2, y2) = slope
    assert y == pytest.approx(y1 + (y2 - y1) * (x - x1) / (x2 - x1), abs=0.05)


# ---- in a browser --------------------------------------------------------------------------------------------------

#: First in the page: whatever goes wrong later is written where the test finds it.
WATCH = """<script>
onerror = (text, file, line) => document.documentElement.setAttribute("data-error", line + ": " + text);
document.addEventListener("securitypolicyviolation", e => onerror(e.violatedDirective, "", 0));
</script>"""
#: Last: filter for one layer, sort a table by its last but one column, and say what can be seen.
USE = """<script>
const seen = () => [...document.querySelectorAll("tr[data-row]")].filter(row => row.offsetParent !== null).length;
const say = (name, value) => document.documentElement.setAttribute("data-" + name, value);
say("all", seen());
say("wide", document.documentElement.scrollWidth > innerWidth);
const input = document.querySelector("input");
input.value = "POOL2 net"; input.dispatchEvent(new Event("input")); say("filtered", seen());
input.value = ""; input.dispatchEvent(new Event("input")); say("again", seen());
const table = [...document.querySelectorAll("table.rows")].find(table => table.textContent.includes("pool2"));
const ratios = () => [...table.tBodies[0].rows].map(row => row.cells[2].dataset.sort).join();
const head = table.tHead.rows[0].cells[2].querySelector("button");
head.click(); say("up", ratios()); head.click(); say("down", ratios());
</script>"""


@needs_browser
def test_a_browser_runs_it_without_errors_and_draws_it(html, tmp_path):
    watched = html.replace("<head>", "<head>" + WATCH, 1).replace("</body>", USE + "</body>", 1)
    path, shot = tmp_path / "page.html", tmp_path / "page.png"
    path.write_text(watched, encoding="utf-8")
    dumped = chromium("--dump-dom", "--window-size=1280,1000", path.as_uri(), home=tmp_path)
    (root,) = re.findall(r"<html[^>]*>", dumped)
    found = dict(re.findall(r'data-(\w+)="([^"]*)"', root))
    assert "error" not in found, found
    everything = str(len(made_up.run().rows))
    assert (found["all"], found["filtered"], found["again"], found["wide"]) == (everything, "1", everything, "false")
    up = [float(value) for value in found["up"].split(",")]
    assert up == sorted(up) and found["down"].split(",") == found["up"].split(",")[::-1] and len(up) == 4

    path.write_text(html, encoding="utf-8")
    chromium(f"--screenshot={shot}", "--window-size=1280,3600", path.as_uri(), home=tmp_path)
    pixels = (image.imread(shot)[..., :3] * 255).round().astype(int)
    assert pixels.shape == (3600, 1280, 3)
    # The blue and the orange of the bars on their track, in the lower half, where the rows are.
    lower = pixels[1800:]
    for bar in ((83, 131, 204), (206, 126, 80)):
        assert np.count_nonzero((abs(lower - bar) < 4).all(-1)) > 2000
    blank = (pixels == pixels[0, 0]).all(-1)
    assert 0.1 < blank.mean() < 0.8
