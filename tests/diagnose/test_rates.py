from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gpukern.diagnose import DiagnoseError, learning_rate_range_test
from gpukern.diagnose.rates import _judge


class Bowl(nn.Module):
    """A loss of curvature/2 · ‖θ‖², which gradient descent leaves at rates above 2/curvature."""

    def __init__(self, curvature: float = 4.0) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(3))
        self.curvature = curvature

    def forward(self, x):
        return self.curvature / 2 * self.theta.square().sum() * x.mean()


BATCH = torch.ones(2, 1), torch.zeros(2)


def run(model, batches=BATCH, optimizer=None, **options):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    return learning_rate_range_test(model, batches, optimizer, lambda output, targets: output, **options)


def test_rates_grow_by_the_same_factor_and_losses_are_those_of_descent():
    found = run(Bowl(), lowest=1e-4, highest=1e-1, steps=31, smoothing=0.0)
    assert found.rates[0] == 1e-4 and found.rates[-1] == pytest.approx(1e-1)
    assert [b / a for a, b in zip(found.rates, found.rates[1:], strict=False)] == pytest.approx([1000 ** (1 / 30)] * 30)
    theta, losses = 1.0, []
    for rate in found.rates:
        losses.append(6 * theta**2)
        theta -= rate * 4 * theta
    assert found.losses == pytest.approx(losses, rel=1e-5) and found.smoothed == found.losses


def test_smoothing_is_that_of_the_formula():
    found = run(Bowl(), lowest=1e-3, highest=1e-1, steps=12, smoothing=0.8)
    average = 0.0
    for number, loss in enumerate(found.losses, 1):
        average = 0.8 * average + 0.2 * loss
        assert found.smoothed[number - 1] == pytest.approx(average / (1 - 0.8**number))


def test_test_ends_when_the_loss_diverges_and_the_interval_lies_below():
    found = run(Bowl(), lowest=1e-4, highest=100, steps=120)
    assert found.diverged and len(found.rates) < 120
    low, high = found.suggested
    assert low < found.steepest <= high < 2 / 4
    assert "rates from" in found.finding and "higher" not in found.finding


def test_loss_that_becomes_nan_ends_the_test():
    found = run(Bowl(1e30), lowest=1e-4, highest=100, steps=50)
    assert found.diverged and found.suggested is None and "falls at no rate" in found.finding
    assert "nan" in found.to_json() or "inf" in found.to_json()


def test_range_that_ends_too_early_is_told():
    found = run(Bowl(), lowest=1e-4, highest=1e-1, steps=40)
    assert not found.diverged and "test higher rates" in found.finding


def test_noise_is_no_fall():
    losses = [2.3 + 0.01 * math.sin(7 * number) for number in range(50)]
    found = _judge([10 ** (number / 10) for number in range(50)], losses, losses, False)
    assert found.suggested is None and found.steepest is None


def test_model_optimizer_and_random_state_are_left_as_they_were():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.3))
    optimizer = torch.optim.Adam([{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 1e-4}])
    kept, random = [value.clone() for value in model.state_dict().values()], torch.get_rng_state()
    data = torch.utils.data.TensorDataset(torch.randn(12, 4), torch.randint(0, 3, (12,)))
    random = torch.get_rng_state()
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    once, again = (learning_rate_range_test(model, loader, optimizer, steps=12) for _ in range(2))
    assert once == again, "the same seed shuffles alike"
    assert all(map(torch.equal, model.state_dict().values(), kept)) and torch.equal(torch.get_rng_state(), random)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-4] and not optimizer.state


def test_groups_keep_the_ratios_of_their_rates():
    model, rates = Bowl(), []
    other = nn.Parameter(torch.ones(1))
    model.other = other
    optimizer = torch.optim.SGD([{"params": [model.theta], "lr": 0.2}, {"params": [other], "lr": 0.02}])

    def step(model, optimizer, batch):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return model(batch[0])

    run(model, optimizer=optimizer, training_step=step, steps=10)
    assert all(low == pytest.approx(high / 10) for high, low in rates)


def test_picture_and_table_are_made(tmp_path):
    found = run(Bowl(), steps=60)
    found.plot(tmp_path / "rates.png")
    run(Bowl(1e30), steps=20).plot(tmp_path / "nothing.png")
    assert len(list(tmp_path.iterdir())) == 2
    assert "smoothed" in str(found) and json.loads(found.to_json())["diverged"]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"lowest": 1.0, "highest": 0.1}, ValueError, "lowest < highest"),
        ({"steps": 9}, ValueError, "steps of 10"),
        ({"smoothing": 1.0}, ValueError, "smoothing"),
        ({"batches": []}, ValueError, "no batches"),
        ({"batches": iter([BATCH])}, TypeError, "begin again"),
        ({"batches": 3}, TypeError, "got int"),
        ({"training_step": lambda model, optimizer, batch: None}, DiagnoseError, "must return its loss"),
    ],
)
def test_what_cannot_be_tested_is_refused(options, error, said):
    with pytest.raises(error, match=said):
        run(Bowl(), **options)


def test_cross_entropy_is_the_default_loss():
    model = nn.Linear(4, 3)
    batch = torch.randn(8, 4), torch.randint(0, 3, (8,))
    found = learning_rate_range_test(model, batch, torch.optim.SGD(model.parameters(), lr=1.0), steps=10)
    assert found.losses[0] == pytest.approx(F.cross_entropy(model(batch[0]), batch[1]).item(), rel=1e-5)
