"""Giving back: the groups that cost most go back to 16 bits until the target holds, and no more of them."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import gpukern
from gpukern.fusion import FusionError
from gpukern.fusion.report import FusionReport
from tests.fusion.quantization.nets import batches, chain

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("reference_mode"),
]


def fused(model: nn.Module, target, **options) -> gpukern.FusedModel:
    return gpukern.fuse(model, batches(1, 2)[0], dtype="int8", calibrate=batches(), target=target, **options)


def eight(model: gpukern.FusedModel) -> int:
    return sum(group.precision == "int8" for group in model.report.quantization.groups)


def with_outlier() -> nn.Module:
    """One layer that eight bits ruin: its input has a channel a thousand times as large as what it computes with."""
    model = chain()
    with torch.no_grad():
        wide, reader = model[1], model[2]
        wide[1].weight[0], wide[1].bias[0] = 1e3, 1e3
        reader[0].weight[0] = 1e-6
    return model


def test_only_what_the_target_needs_is_given_back():
    torch.manual_seed(0)
    model = with_outlier()

    def clean(candidate: gpukern.FusedModel) -> float:
        x = batches(1, 8, seed=9)[0]
        with torch.no_grad():
            truth = model(x)
        return -((candidate(x).float() - truth).norm() / truth.norm()).item()

    whole = fused(model, (lambda candidate: 1.0, 0.5))
    every, all_in_eight = clean(whole), whole.report.quantization
    found = fused(model, (clean, every / 3))
    told = found.report.quantization
    back = [group for group in told.groups if group.given_back]
    assert 0 < len(back) < 4 and eight(found) >= 1 and told.metric == "clean" and told.target == every / 3
    assert clean(found) >= every / 3 > told.every.value and told.reached.value >= every / 3
    # The noisiest alone goes first.
    noise = {group.modules: group.noise for group in told.groups if group.noise is not None}
    assert max(noise, key=noise.get) in [group.modules for group in back]
    assert all(group.why == "given back" and group.precision == "float16" for group in back)
    assert all_in_eight.bytes < told.bytes < told.bytes_before


def test_all_may_be_given_back_and_that_is_told():
    found = fused(chain(), (lambda candidate: -_eights(candidate), 0))
    assert eight(found) == 0 and any("No group is in 8 bits" in note for note in found.report.notes)
    assert found.report.quantization.bytes == found.report.quantization.bytes_before


def _eights(candidate: gpukern.FusedModel) -> int:
    return sum(buffer.dtype is torch.int8 for buffer in candidate.buffers())


def test_a_target_out_of_reach_is_an_error_with_the_groups_and_numbers():
    with pytest.raises(FusionError) as caught:
        fused(chain(), (lambda candidate: 0.25 + 0.5 * (_eights(candidate) == 0), 0.9))
    words = str(caught.value)
    assert "the target cannot be met, the metric ≥ 0.9" in words
    assert "with all groups in 8 bits the metric 0.25" in words and "given back to 16 bits the metric 0.75" in words
    assert re.search(r"cost most: conv2d \+ batch_norm \+ relu", words)


def test_a_metric_that_returns_no_number_is_refused():
    with pytest.raises(TypeError, match="the metric of target returns a number, got str"):
        fused(chain(), (lambda candidate: "good", 0.9))


def test_a_metric_of_nan_does_not_hold():
    with pytest.raises(FusionError, match="the metric nan"):
        fused(chain(), (lambda candidate: float("nan"), 0.9))


def test_the_report_has_a_table_a_page_and_a_file(tmp_path):
    found = fused(chain(), 0.5)
    report = found.report
    told = report.quantization
    text = str(report)
    assert "of 6 products in 8 bits" in text and "signal-to-noise of the outputs" in text and "the first layer" in text
    assert repr(found).startswith("FusedModel(Sequential, int8 in") and "else float16" in repr(found)
    report.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "In 8 bits (int8)" in page and f"on {told.aside} rows kept aside" in page
    # Beside each other, the figures of eight bits and those of 16.
    assert "in 8 bits; target 0.5; signal-to-noise" in page and "<span>error against float64, in float16</span>" in page
    assert FusionReport.from_json(report.to_json()) == report
    assert any("kept aside for the proof" in note for note in report.notes)
    assert {group.operator for group in report.fused} == {"gpukern::conv2d_quantized"}
    # Errors and bytes are those of eight bits.
    by_modules = {group.modules: group for group in told.groups}
    for group in report.fused:
        same = by_modules[group.modules]
        assert group.bytes == same.bytes and group.error == pytest.approx(10 ** (-same.snr / 20))
    assert told.bytes < 0.7 * told.bytes_before
