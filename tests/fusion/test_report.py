"""The report as JSON, on a terminal, as text, and as a file that is whole or not there."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from gpukern.fusion.report import FusionReport, NotFused, formatting
from tests.fusion.made_up import CHECK, TIMINGS, group, report

#: What the version before the common codec wrote.
WRITTEN = Path(__file__).with_name("written")
BARE = {"fused": (), "not_fused": (), "verification": None, "graph_before": (), "graph_after": (), "environment": {}}


@pytest.mark.parametrize("given", [{}, TIMINGS, BARE, {"notes": ("loud",)}], ids=["usual", "timed", "bare", "noted"])
def test_json_keeps_everything(given):
    made = report(**given)
    assert FusionReport.from_json(made.to_json()) == made


def test_json_is_json_even_of_what_is_not_finite():
    made = report(verification=dataclasses.replace(CHECK, error=float("inf"), unfused=float("-inf")))
    text = made.to_json()

    def refuse(word):
        raise AssertionError(word)

    json.loads(text, parse_constant=refuse)
    assert FusionReport.from_json(text) == made
    nan = report(verification=dataclasses.replace(CHECK, error=float("nan")))
    assert not FusionReport.from_json(nan.to_json()).verification.passed


def test_json_of_a_later_version_has_fields_that_are_not_known_here():
    given = json.loads(report().to_json())
    given["fused"][0]["colour"] = given["colour"] = "red"
    assert FusionReport.from_json(json.dumps(given)) == report()
    del given["fused"][1]["note"]
    assert FusionReport.from_json(json.dumps(given)).fused[1].note == ""


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda given: given.pop("format"), "not a 'gpukern fusion report"),
        (lambda given: given.update(format="gpukern fusion report, version 99"), "not a 'gpukern fusion report"),
        (lambda given: given.pop("before"), "before"),
        (lambda given: given["before"].update(operators="many"), r'before.operators: expected int, got "many"'),
        (lambda given: given["fused"][1].update(modules="conv"), r'fused\[1\].modules: expected a list, got "conv"'),
        (lambda given: given["fused"][0].update(error=True), r"fused\[0\].error: expected float, got true"),
        (lambda given: given.update(environment=[]), r"environment: expected an object, got \[\]"),
    ],
)
def test_other_json_is_refused_with_the_place(change, complaint):
    given = json.loads(report().to_json())
    change(given)
    with pytest.raises(ValueError, match=complaint):
        FusionReport.from_json(json.dumps(given))


@pytest.mark.parametrize("path", sorted(WRITTEN.glob("report*.json")), ids=lambda path: path.stem)
def test_reports_of_an_earlier_version_are_read_and_written_byte_for_byte(path):
    text = path.read_text(encoding="utf-8")
    assert FusionReport.from_json(text).to_json() == text


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7"])
def test_what_is_no_report_is_a_value_error(text):
    with pytest.raises(ValueError):
        FusionReport.from_json(text)


@pytest.mark.parametrize("write", [FusionReport.to_json, FusionReport.to_html], ids=["json", "html"])
def test_files_are_replaced_whole(write, tmp_path, monkeypatch):
    path = tmp_path / "report.out"
    write(report(), path)
    old = path.read_bytes()
    write(report(model="another"), str(path))
    assert path.read_bytes() != old and b"another" in path.read_bytes()

    def fails(*args):
        raise OSError("no space left on device")

    old = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fails)
        with pytest.raises(OSError, match="no space"):
            write(report(), path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == [path.name]
    with pytest.raises(OSError):
        write(report(), tmp_path / "nowhere" / "report.out")


def test_text_says_all_that_is_known():
    text = str(report(**TIMINGS, notes=("the model was in training mode",)))
    assert "\x1b" not in text
    for part in (
        "torchvision:resnet50 in float16: 2 groups fused, 3 left as it was",
        "note: the model was in training mode",
        "25,557,032", "162 MB", "56.8 MB", "2.85×", "5.2e-04", "4.1e-04", "96.9%", "8.10 ms", "32,800", "2.08×",
        "layer1.0: conv1, bn1, relu", "conv2d + batch_norm + add", "box 256×64", "38.6 MB", "float16: large",
        "its input has other users: aux.bn, aux.bn2", "batch statistics: norm", "device CPU",
    ):  # fmt: skip
        assert part in text, part


def test_text_leaves_out_what_is_not_known():
    text = str(report(**BARE))
    assert "0 groups fused, nothing left as it was" in text and "not verified" in text
    assert "not fused, because" not in text and "latency" not in text
    assert "plan" not in str(report(fused=(group("conv"),)))


def test_names_cannot_steer_a_terminal():
    hostile = "\x1b[31mred[bold]\x07"
    made = report(fused=(group(hostile),), not_fused=(NotFused(hostile, hostile),), notes=(hostile,), model=hostile)
    assert "\x1b" not in str(made) and "\x07" not in str(made) and "red[bold]" in str(made)


def test_a_terminal_gets_colour_and_every_group():
    console = Console(width=100, force_terminal=True, color_system="standard", file=io.StringIO())
    console.print(report())
    text = console.file.getvalue()
    assert "\x1b[1m" in text and "conv1" in text and "conv2" in text


def test_many_names_of_a_reason_are_counted():
    many = tuple(NotFused(f"bn{number}", "batch statistics") for number in range(20))
    assert "20  batch statistics: bn0, bn1, bn2, bn3, bn4, bn5 and 14 more" in str(report(not_fused=many))


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (("a.b.conv", "a.b.bn"), "a.b: conv, bn"),
        (("a.conv", "b.bn"), "a.conv, b.bn"),
        (("a.b", "a.b.c"), "a: b, b.c"),
        (("a.b.conv",), "a.b.conv"),
        (("conv", "bn"), "conv, bn"),
        (("",), "(the model)"),
        ((), ""),
    ],
)
def test_what_paths_share_is_written_once(names, shown):
    assert formatting.modules(names) == shown


def test_only_all_rows_are_a_hundred_percent():
    shown = map(formatting.agreement, (1.0, 0.9999, 0.96875, None))
    assert list(shown) == ["100%", "99.9%", "96.9%", "–"]
