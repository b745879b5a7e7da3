"""``gpukern fuse`` and ``gpukern explain FILE.pt2``."""

from __future__ import annotations

import importlib
import json
import os
import types

import pytest
import torch
from typer.testing import CliRunner

from gpukern.cli import app
from gpukern.fusion import affine
from gpukern.fusion.errors import FusionError
from gpukern.fusion.report import IN_ARCHIVE, FusionReport
from tests.fusion.made_up import report, tiny

TINY = ("tests.fusion.made_up:tiny", "--input", "2,3,8,8", "--device", "cpu")
runner = CliRunner()


def run(*words: str) -> object:
    return runner.invoke(app, list(map(str, words)), env={"COLUMNS": "300"})


class Stub:
    """In place of ``gpukern.fuse``: what it was asked, and an answer without work."""

    def __init__(self, problem: Exception | None = None) -> None:
        self.problem, self.asked = problem, []

    def __call__(self, model, inputs, **settings):
        self.asked.append((model, inputs, settings))
        if self.problem:
            raise self.problem
        return types.SimpleNamespace(report=report(), module=model, save=self.save)

    @staticmethod
    def save(path):
        path.write_text("saved")


@pytest.fixture
def stub(monkeypatch):
    def put(problem: Exception | None = None) -> Stub:
        made = Stub(problem)
        monkeypatch.setattr(importlib.import_module("gpukern.fusion"), "fuse", made)
        return made

    return put


def test_it_fuses_verifies_and_writes_all_that_was_asked_for(tmp_path):
    page, values, saved = tmp_path / "out.html", tmp_path / "out.json", tmp_path / "tiny.pt2"
    result = run("fuse", *TINY, "--report", page, "--json", values, "--save", saved)
    assert result.exit_code == 0, result.output
    assert "conv2d + batch_norm + relu" in result.output and "error against float64" in result.output
    found = FusionReport.from_json(values.read_text("utf-8"))
    assert found.model == TINY[0] and found.verification.passed and found.fused[0].modules == ("0", "1", "2")
    assert "<!doctype html>" in page.read_text("utf-8")
    assert sorted(os.listdir(tmp_path)) == ["out.html", "out.json", "tiny.pt2"]

    explained = run("explain", saved)
    assert explained.exit_code == 0 and explained.output == str(found) + "\n"


def test_options_reach_the_work(stub):
    asked = stub().asked
    words = ("--dtype", "bf16", "--no-verify", "--skip", "head.*", "--skip", "5", "--strict", "--no-channels-last")
    words += ("--seed", "7", "--input", "4x5")
    assert run("fuse", *TINY, *words).exit_code == 0
    assert run("fuse", *TINY, *words).exit_code == 0
    (model, inputs, settings), (_, again, _) = asked
    assert settings == {
        "dtype": torch.bfloat16, "verify": False, "skip": ["head.*", "5"], "strict": True, "channels_last": False,
        "cuda_graph": False,
    }  # fmt: skip
    assert [tuple(each.shape) for each in inputs] == [(2, 3, 8, 8), (4, 5)] and not model.training
    assert all(torch.equal(*pair) for pair in zip(inputs, again, strict=True))
    assert run("fuse", *TINY, "--dtype", "float16").exit_code == 0
    assert asked.pop()[2]["dtype"] is torch.float16
    assert run("fuse", *TINY).exit_code == 0
    assert asked[2][2]["dtype"] is None and asked[2][2]["verify"] and not torch.equal(asked[2][1][0], inputs[0])


def test_weights_are_read_and_random_ones_are_told(stub, monkeypatch, tmp_path):
    asked = stub().asked
    torch.save(tiny().state_dict(), tmp_path / "w.pth")
    assert "random" not in run("fuse", *TINY, "--weights", tmp_path / "w.pth").output
    saved = torch.load(tmp_path / "w.pth")
    assert all(torch.equal(value, saved[name]) for name, value in asked[0][0].state_dict().items())
    sources = importlib.import_module("gpukern.fusion.sources")
    monkeypatch.setattr(sources, "load_model", lambda name, weights: tiny())
    told = "note: The weights are random"
    assert told in run("fuse", "timm:tiny", *TINY[1:]).output
    assert told not in run("fuse", "timm:tiny", *TINY[1:], "--weights", tmp_path / "w.pth").output


def test_what_cannot_be_fused_is_status_1_and_writes_nothing(stub, tmp_path):
    stub(FusionError("torch.export cannot capture the model: it prints"))
    result = run("fuse", *TINY, "--report", tmp_path / "out.html")
    assert result.exit_code == 1 and "gpukern fuse: torch.export cannot capture" in result.output
    assert not os.listdir(tmp_path)


def test_a_failed_verification_is_status_1_with_a_report_and_no_model(monkeypatch, tmp_path):
    """Of a batch norm that is folded wrongly."""
    right = affine._batch_norm

    def wrong(program, node):
        found = right(program, node)
        found.shift.add_(0.1)
        return found

    monkeypatch.setattr(affine, "_batch_norm", wrong)
    page, values, saved = tmp_path / "out.html", tmp_path / "out.json", tmp_path / "tiny.pt2"
    saved.write_text("of yesterday")
    result = run("fuse", *TINY, "--report", page, "--json", values, "--save", saved)
    blamed = "To blame is conv2d + batch_norm + relu"
    assert result.exit_code == 1 and blamed in result.output.splitlines()[-1]
    assert "tests.fusion.made_up:tiny in float32: the verification FAILED; 1 group fused" in result.output
    assert saved.read_text() == "of yesterday"
    found = FusionReport.from_json(values.read_text("utf-8"))
    assert not found.verification.passed and blamed in found.notes[0] and found.fused[0].error > 1e-3
    assert "FAILED" in page.read_text("utf-8") and '<b class="bad">' in page.read_text("utf-8")


def test_an_input_that_the_model_does_not_take_is_status_2():
    result = run("fuse", TINY[0], "--input", "2,4,8,8")
    assert result.exit_code == 2 and "the model does not take 2×4×8×8" in result.output


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("nothing", "--input", "1,3"), "names no model"),
        (("tests.fusion.made_up:tiny",), "Missing option '--input'"),
        (("tests.fusion.made_up:tiny", "--input", "1,a"), "is no shape"),
        ((*TINY, "--dtype", "int4"), "--dtype: no dtype is called 'int4'"),
        ((*TINY, "--dtype", "fp8"), "dtype='fp8' needs calibrate="),
        ((*TINY, "--dtype", "float64"), "--dtype: no dtype is called 'float64'"),
        ((*TINY, "--weights", "nowhere.pth"), "there is no file nowhere.pth"),
        ((*TINY, "--report", "nowhere/out.html"), "there is no folder nowhere"),
        ((*TINY, "--json", "tests"), "tests is a folder"),
        ((*TINY, "--save", "out.onnx"), "does not end in .pt2"),
    ],
    ids=lambda words: words if isinstance(words, str) else "",
)
def test_bad_words_are_status_2_before_any_work(stub, words, complaint):
    asked = stub().asked
    result = run("fuse", *words)
    assert result.exit_code == 2 and complaint in result.output and not asked


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_what_needs_cuda_says_so_without_it():
    result = run("fuse", *TINY[:3], "--device", "cuda")
    assert result.exit_code == 2 and "there is no CUDA device here" in result.output
    result = run("fuse", *TINY, "--cuda-graph")
    assert result.exit_code == 1 and "cuda_graph=True needs" in result.output


def test_an_exported_model_is_fused_with_the_names_it_had(tmp_path):
    path, values = tmp_path / "tiny.pt2", tmp_path / "out.json"
    torch.export.save(torch.export.export(tiny().eval(), (torch.randn(2, 3, 8, 8),)), path)
    result = run("fuse", path, *TINY[1:], "--json", values)
    assert result.exit_code == 0, result.output
    found = FusionReport.from_json(values.read_text("utf-8"))
    assert found.model == str(path) and found.fused[0].pattern == "conv2d + batch_norm + relu"
    assert found.fused[0].modules == ("0", "1", "2")


@pytest.mark.parametrize("option", ["--report", "--json", "--save"])
def test_files_that_cannot_be_written_are_status_1_and_stay(stub, monkeypatch, tmp_path, option):
    made = stub()
    path = tmp_path / "out.pt2"
    path.write_text("old")

    def fails(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fails)
    monkeypatch.setattr(made, "save", fails)
    result = run("fuse", *TINY, option, path)
    assert result.exit_code == 1 and f"could not be written to {path}: no space left" in result.output
    assert "torchvision:resnet50" in result.output or TINY[0] in result.output  # the report was shown before
    assert path.read_text() == "old" and os.listdir(tmp_path) == [path.name]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "r50.pt2"
    exported = torch.export.export(tiny().eval(), (torch.randn(2, 3, 8, 8),))
    torch.export.save(exported, path, extra_files={IN_ARCHIVE: report().to_json()})
    return path


def test_explain_shows_the_report_of_a_saved_model(saved, tmp_path):
    for words in ((saved,), ("model", saved)):
        result = run("explain", *words)
        assert (result.exit_code, result.output) == (0, str(report()) + "\n")
    page = tmp_path / "out.html"
    result = run("explain", saved, "--json", "--report", page)
    assert json.loads(result.stdout) == json.loads(report().to_json()) and page.exists()


@pytest.mark.parametrize("words", [("nowhere.pt2",), ("pyproject.toml",), ("model", "nowhere")])
def test_explain_of_other_files_is_status_2(words):
    result = run("explain", *words)
    assert result.exit_code == 2 and words[-1] in result.output


def test_explain_still_knows_its_other_words():
    assert run("explain", "cnov").exit_code == 2 and "No such command" in run("explain", "cnov").output
    assert run("explain", "linear", "--help").exit_code == 0
    assert "fuse" in run("--help").output
