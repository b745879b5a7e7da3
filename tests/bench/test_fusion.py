"""``python -m bench.fusion``: what it counts, on networks small enough to count by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from bench import fusion

pytestmark = pytest.mark.usefixtures("reference_mode")


class Branches(nn.Module):
    """Three batch norms: one that follows a convolution, one whose convolution is used twice, one after an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))

    def forward(self, x):
        x = self.norms[0](self.first(x)).relu()
        y = self.second(x)
        return self.norms[2](self.norms[1](y) + y).mean((2, 3))


@pytest.fixture
def branches(monkeypatch):
    monkeypatch.setattr(fusion, "build", lambda name: Branches().eval())


def test_counts_what_follows_a_result_of_one_use():
    assert fusion.count(Branches().eval(), torch.randn(2, 3, 16, 16)) == (3, 1)


class Apart(nn.Module):
    """Five batch norms: after a concatenation, half of the channels and rows; after a concatenation with what is no
    layer, and across the features of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.linear = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 4)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for channels in (8, 2, 7))
        self.rows = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(2))

    def forward(self, x):
        y = self.norms[0](torch.cat([self.first(x), self.second(x)], 1)).relu()
        half = self.norms[1](self.first(x.neg()).chunk(2, 1)[0]).relu()
        none = self.norms[2](torch.cat([self.second(x.abs()), x[:, :, 1:-1, 1:-1].exp()], 1)).relu()
        rows = x.mean(1)[:, :4, :4]
        one = self.rows[0](self.linear(rows).flatten(0, 1)).relu()
        return y.mean() + half.mean() + none.mean() + one.mean() + self.rows[1](self.linear(rows.exp())).relu().mean()


def test_counts_what_only_moves_part_from_its_layer(monkeypatch):
    monkeypatch.setattr(fusion, "build", lambda name: Apart().eval())
    row = fusion.measure("torchvision:apart")
    assert (row.norms, row.foldable, row.folded) == (5, 3, 3) and not row.problem


def test_a_row(branches):
    row = fusion.measure("torchvision:branches")
    assert (row.norms, row.foldable, row.folded) == (3, 1, 1) and not row.problem
    assert row.operators_after < row.operators_before
    assert 0 < row.error < 1e-5 and 0 < row.unfused_error < 1e-5
    assert "3 batch norms; of 1 that" in fusion.summary([row]) and "Wrong: none" in fusion.summary([row])


def test_a_model_that_cannot_be_fused_is_counted_as_unfolded_and_wrong(branches, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no way")

    monkeypatch.setattr(fusion.gpukern, "fuse", fail)
    row = fusion.measure("torchvision:branches")
    assert row.folded == 0 and math.isnan(row.error) and "no way" in row.problem
    assert "0 were folded (0.0%)" in fusion.summary([row]) and "Wrong: torchvision:branches" in fusion.summary([row])
    assert "no way" in fusion.markdown([row])


def test_writes_table_and_json(branches, monkeypatch, tmp_path):
    monkeypatch.setattr(fusion, "ROOT", tmp_path)
    fusion.main(model=["torchvision:branches"], write=True)
    assert "| torchvision:branches |" in (tmp_path / "docs" / "fusion-models.md").read_text()
    (row,) = json.loads((tmp_path / "bench" / "results" / "host" / "fusion_models.json").read_text())
    assert row["folded"] == 1


def test_the_page_is_that_of_the_kept_rows():
    kept = json.loads((fusion.ROOT / "bench" / "results" / "host" / "fusion_models.json").read_text())
    page = (fusion.ROOT / "docs" / "fusion-models.md").read_text()
    rows = [fusion.Row(**row) for row in kept]
    written = fusion.markdown(rows)
    assert written.split("\n")[4:] == page.split("\n")[4:] and fusion.summary(rows) in page


def test_models_are_named_once():
    assert len(set(fusion.TORCHVISION)) == len(fusion.TORCHVISION) and len(set(fusion.TIMM)) == len(fusion.TIMM)
    assert len(fusion.TORCHVISION) + len(fusion.TIMM) >= 40
