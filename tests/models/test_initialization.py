from __future__ import annotations

import pytest
from torch import nn

from models import initialization
from models.initialization import EXPERIMENTS, deviations, draw, run, train_features


def spread(report):
    return [layer.output.deviation for layer in report.activations]


def test_numbers_are_the_lectures():
    """Those of six layers of 4096 units: the lecture's page on tanh with N(0, 0.01²), and on Xavier."""
    small, large, xavier = run(experiments=EXPERIMENTS[:3])
    assert spread(small) == pytest.approx([0.49, 0.29, 0.18, 0.11, 0.07, 0.05], abs=0.02)
    assert spread(xavier) == pytest.approx([0.63, 0.49, 0.41, 0.36, 0.32, 0.30], abs=0.02)
    assert min(layer.saturated for layer in large.activations) > 0.35
    assert max(layer.saturated for layer in (*small.activations, *xavier.activations)) < 0.1


def test_scaling_by_width_gives_the_same_numbers_for_any():
    reports = dict(zip((each.title for each in EXPERIMENTS), run(512), strict=True))
    assert spread(reports["tanh, Xavier 1/√D"]) == pytest.approx([0.63, 0.49, 0.41, 0.36, 0.32, 0.30], abs=0.02)
    assert spread(reports["ReLU, Xavier 1/√D"])[-1] < 0.2 * spread(reports["ReLU, Xavier 1/√D"])[0]
    # Without bias E[y²] stays 1: the deviation of a half-normal distribution is √(1 − 1/π).
    assert spread(reports["ReLU, Kaiming √(2/D)"]) == pytest.approx([0.826] * 6, abs=0.06)
    assert any("shrink" in finding for finding in reports["ReLU, Xavier 1/√D"].findings)
    assert not reports["ReLU, Kaiming √(2/D)"].findings


def test_constant_weights_learn_one_feature(monkeypatch):
    monkeypatch.setattr(initialization, "STEPS", 60)
    constant, random = train_features(0.01), train_features(None)
    assert constant.distinct == 1 and constant.weights.std() > 0, "it learns, the same in every unit"
    assert random.distinct == initialization.UNITS
    assert constant.accuracy < 0.4 < 0.6 < random.accuracy
    zero = train_features(0.0)
    assert zero.distinct == 1 and not zero.weights.any()


def test_table_and_picture_are_made():
    reports = run(32)
    features = [initialization.Features("θ ≡ 0", nn.init.zeros_(nn.Linear(16, 8).weight).detach(), 0.1)]
    assert deviations(reports).row_count == 2 * len(EXPERIMENTS)
    assert len(draw(reports, features).get_axes()) == 6 * len(EXPERIMENTS) + initialization.UNITS
