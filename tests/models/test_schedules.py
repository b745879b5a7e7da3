"""Learning rates are torch's, as functions of the step; averages are exponential."""

from __future__ import annotations

import pytest
import torch
from torch.optim import lr_scheduler

from models.averaging import Average
from models.schedules import Schedule

TORCHS = {
    "constant": lambda optimizer, total: lr_scheduler.ConstantLR(optimizer, factor=1.0),
    "step": lambda optimizer, total: lr_scheduler.StepLR(optimizer, 7, gamma=0.3),
    "cosine": lambda optimizer, total: lr_scheduler.CosineAnnealingLR(optimizer, total),
    "one-cycle": lambda optimizer, total: lr_scheduler.OneCycleLR(optimizer, 1.0, total),
}


@pytest.mark.parametrize("name", TORCHS)
@pytest.mark.parametrize("total", [20, 33])
def test_factors_are_torchs(name, total):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    scheduler = TORCHS[name](optimizer, total)
    schedule = Schedule(name, total, every=7, gamma=0.3)
    for step in range(total):
        assert schedule.factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12), step
        optimizer.step()
        if step + 1 < total:
            scheduler.step()


def test_a_warm_up_rises_and_the_schedule_begins_after_it():
    schedule = Schedule("cosine", 14, warmup=4)
    assert [schedule.factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1]
    whole = Schedule("cosine", 10)
    assert [schedule.factor(step) for step in range(4, 14)] == [whole.factor(step) for step in range(10)]


@pytest.mark.parametrize("name", TORCHS)
@pytest.mark.parametrize("total", [0, 1, 2, 3])
def test_short_trainings_have_finite_rates(name, total):
    assert all(0 <= Schedule(name, total).factor(step) <= 1 for step in range(total + 2))


def test_an_average_forgets_the_beginning_and_includes_statistics():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    average = Average(model, 0.6)
    expected = model[0].weight.detach().clone()
    for step in range(12):
        with torch.no_grad():
            model[0].weight.normal_()
        model(torch.randn(5, 2))
        average.update(model)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model[0].weight
    torch.testing.assert_close(average.model[0].weight, expected)
    assert average.model[1].num_batches_tracked == 12
    assert not torch.equal(average.model[1].running_mean, model[1].running_mean)
    other = Average(model, 0.6)
    other.load_state_dict(average.state_dict())
    assert other.steps == 12 and torch.equal(other.model[0].weight, average.model[0].weight)
