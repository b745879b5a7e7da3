"""The report as an HTML page: all of it there, nothing from elsewhere, right in a browser."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from matplotlib import image

from gpukern.fusion.report import FusedGroup, NotFused
from gpukern.fusion.report.html import page
from models.resnet import resnet50
from tests.browser import Parsed, chromium, needs_browser
from tests.fusion.made_up import CHECK, TIMINGS, group, of_network, report


@pytest.fixture(scope="module")
def network():
    left = tuple(NotFused(f"aux.{number}.bn", f"reason {number % 3}") for number in range(30))
    return of_network(resnet50(), not_fused=left, **TIMINGS)


@pytest.fixture(scope="module")
def html(network):
    return page(network)


def test_it_is_well_formed_and_asks_for_nothing_else(html):
    parsed = Parsed(html)
    assert not re.search(r"https?:|url\(|@import", html)
    assert not {tag for tag, _ in parsed.elements} & {"link", "img", "iframe", "object", "base"}
    assert all(target.startswith("#") for target in parsed.values("href")) and not parsed.values("src")
    ids = parsed.values("id")
    assert len(ids) == len(set(ids)) and {target[1:] for target in parsed.values("href")} <= set(ids)
    assert "$" not in re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)


def test_every_group_and_everything_left_is_there(network, html):
    words = Parsed(html).words
    for number, each in enumerate(network.fused, start=1):
        assert f'id="g{number}"' in html and f'id="a{number}"' in html and f'id="b{number}"' in html
        assert all(name.split(".")[-1] in words for name in each.modules)
    for name, reason in network.not_fused:
        assert name in words and reason in words
    assert html.count(' data-group="53"') >= 5  # before: 4 nodes; after, bars, table


def test_headlines_and_tables(html):
    words = Parsed(html).words
    for part in (
        "177 → 59", "2.85×", "162 MB → 56.8 MB", "4.1e-04", "argmax agrees in 96.9%", "32,800 images per second",
        "53 30 left as it was", "latency, p99", "1.0e-03 allowed: 2 × unfused + 1.0e-05",
    ):  # fmt: skip
        assert part in words, part


def test_names_are_text_whatever_they_hold():
    hostile = '"><script>alert(1)</script>\x1b$title&amp;'
    made = report(
        model=hostile,
        fused=(FusedGroup((hostile,), hostile, hostile, hostile, hostile, hostile, error=1.0),),
        not_fused=(NotFused(hostile, hostile),),
        notes=(hostile,),
        environment={hostile: hostile},
    )
    html = page(made)
    parsed = Parsed(html)
    assert html.count("<script>") == 1 and "\x1b" not in html
    assert '"><script>alert(1)</script>' in parsed.words and "$title&amp;" in parsed.words


def test_the_bars_show_the_most_telling_figure_that_is_known():
    groups = (group("a", bytes=2_000_000, error=1e-3), group("b"))
    assert "MB that each group moves" in page(report(fused=groups))
    timed = (group("a", bytes=2_000_000, expected=3e-6, floor=2e-6), group("b"))
    html = page(report(fused=timed))
    assert "Expected µs" in html and html.count('class="floor"') == 1
    assert "Error of each group" in page(report(fused=(group("a", error=1e-3), group("b", error=float("nan")))))
    assert 'class="bars"' not in page(report(fused=(group("a"), group("b", error=0.0))))


@pytest.mark.parametrize("highest", [1e-7, 0.3, 1.0, 9.99, 25.0, 5e9])
def test_bars_fit_their_scale(highest):
    html = page(report(fused=(group("a", error=highest), group("b", error=highest / 3))))
    heights = [
        float(height) for height in re.findall(r'<rect x="[^"]*" width="[^"]*" y="[^"]*" height="([\d.]+)%"', html)
    ]
    assert 50 < heights[0] <= 100 and heights[1] == pytest.approx(heights[0] / 3, abs=0.01)
    assert 3 <= len(re.findall(r'class="y"', html)) <= 7


def test_a_report_of_nothing_is_a_page_too():
    html = page(report(fused=(), not_fused=(), graph_before=(), graph_after=(), verification=None, environment={}))
    words = Parsed(html).words
    assert "not verified" in words and "nothing was left" in words and 'class="bars"' not in html


def test_a_failed_verification_is_not_green():
    failed = report(verification=dataclasses.replace(CHECK, error=float("nan")))
    assert '<b class="bad">nan' in page(failed) and '<b class="good">4.1e-04' in page(report())


WATCH = """<script>addEventListener("error", event => document.documentElement.dataset.error = event.message);
addEventListener("securitypolicyviolation", event => document.documentElement.dataset.error = event.blockedURI);
</script>"""
USE = """<script>
const say = (name, value) => document.documentElement.dataset[name] = value;
say("wide", document.documentElement.scrollWidth > innerWidth);
const [before, after] = document.querySelectorAll(".picture");
say("scrolls", before.scrollHeight > before.clientHeight);
document.querySelector("#a7").dispatchEvent(new PointerEvent("pointerenter"));
say("lit", new Set([...document.querySelectorAll(".lit")].map(item => item.dataset.group)).size);
say("places", document.querySelectorAll(".lit").length);
say("cut", [...document.querySelectorAll(".picture g, .picture a")].filter(
  item => item.querySelector("text").getBBox().width > item.querySelector("rect").getBBox().width - 10).length);
</script>"""


@needs_browser
def test_a_browser_runs_it_without_errors_and_draws_it(html, tmp_path):
    path, shot = tmp_path / "page.html", tmp_path / "page.png"
    watched = html.replace("<head>", "<head>" + WATCH, 1).replace("</body>", USE + "</body>", 1)
    path.write_text(watched, encoding="utf-8")
    dumped = chromium("--dump-dom", "--window-size=1280,1000", path.as_uri(), home=tmp_path)
    (root,) = re.findall(r"<html[^>]*>", dumped)
    found = dict(re.findall(r'data-(\w+)="([^"]*)"', root))
    assert found == {"wide": "false", "scrolls": "true", "lit": "1", "places": "6", "cut": "0"}

    path.write_text(html, encoding="utf-8")
    chromium(f"--screenshot={shot}", "--window-size=1280,2200", path.as_uri(), home=tmp_path)
    pixels = (image.imread(shot)[..., :3] * 255).round().astype(int)
    assert pixels.shape == (2200, 1280, 3)
    for colour in ((61, 127, 217), (217, 119, 43)):  # the first groups' bars
        assert np.count_nonzero((abs(pixels - colour) < 4).all(-1)) > 2000
    skips = (abs(pixels[:, :] - (31, 95, 191)) < 4).all(-1)
    assert np.count_nonzero(skips) > 300
    blank = (pixels == pixels[0, 0]).all(-1)
    assert 0.1 < blank.mean() < 0.8
