"""Which launches of a model are tuned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gpukern
from gpukern.conv import database
from gpukern.conv.plan import Direction
from gpukern.conv.prepare import observers
from gpukern.runtime.precision import fp32_products
from gpukern.tune import TuneError, tune
from gpukern.tune.record import calls_of
from tests.tune.tools import Clock


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.twice = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, image):
        x = torch.relu(self.norm(self.stem(image)))
        x = self.twice(self.twice(x))
        return {"logits": self.head(x.mean((2, 3))), "features": x}


def test_every_launch_of_a_model_is_recorded_once(device):
    model = Net().to(device)
    calls = calls_of(model, [torch.randn(2, 3, 4, 4, device=device)])
    found = {(call.direction, call.problem.C, call.problem.K, call.problem.R) for call in calls}
    forward, input_grad, weight_grad = Direction
    assert found == {
        (forward, 3, 16, 3), (forward, 16, 16, 3), (forward, 16, 5, 1),
        (weight_grad, 3, 16, 3), (weight_grad, 16, 16, 3), (weight_grad, 16, 5, 1),
        (input_grad, 16, 16, 3), (forward, 5, 16, 1),
    }  # fmt: skip
    # The filter's gradient of both uses of one layer: one call of it.
    assert len([call for call in calls if call.direction is forward and call.problem.C == 16]) == 2
    only = calls_of(model, [torch.randn(2, 3, 4, 4, device=device)], [forward])
    assert {call.problem.K for call in only} == {16, 5} and {call.direction for call in only} == {forward}
    only = calls_of(model, [torch.randn(2, 3, 4, 4, device=device)], [input_grad])
    assert [(call.problem.C, call.direction) for call in only] == [(16, input_grad)]


def test_recording_leaves_everything_as_it_was(device):
    model = Net().to(device)
    image = torch.randn(2, 3, 4, 4, device=device)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls_of(model, [image], input_gradient=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters()) and not image.requires_grad
    assert type(model.stem) is nn.Conv2d and model.training
    with pytest.raises(RuntimeError):
        calls_of(model, [image[:, :2]])
    assert not observers


def test_a_tuned_model_finds_every_plan(folder, device, few, monkeypatch):
    model = Net().to(device, memory_format=torch.channels_last)
    image = torch.randn(2, 3, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    report = tune(model, image, timer=Clock(), progress=False)
    assert len(report.results) == 8
    answers, plain = [], database.lookup
    monkeypatch.setattr(database, "lookup", lambda *question: answers.append(plain(*question)) or answers[-1])
    output = gpukern.convert(model)(image)
    sum(value.square().sum() for value in output.values()).backward()
    assert len(answers) == 8 and all(answers)


def test_tf32_is_as_the_flags_say(device):
    model, image = nn.Conv2d(16, 16, 1).to(device), torch.randn(1, 16, 2, 2, device=device)
    with fp32_products("tf32", "tf32"):
        (call,) = calls_of(model, [image], [Direction.FORWARD])
    assert (call.precision, call.operands.precision, str(call)[-4:]) == ("tf32", "tf32", "tf32")
    with fp32_products("ieee", "ieee"):
        (call,) = calls_of(model, [image], [Direction.FORWARD])
    assert call.precision == "ieee"


def test_without_a_gpu_nothing_is_tuned_or_written(folder, monkeypatch):
    model, image = nn.Conv2d(16, 16, 1), torch.randn(1, 16, 2, 2)
    with pytest.raises(TuneError, match="CUDA device"):
        tune(model, image)
    assert not folder.exists()
