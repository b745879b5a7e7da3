from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gpukern
from gpukern.diagnose import DiagnoseError, activation_statistics, watch_activations


class Student(nn.Module):
    """Calls its activations as functions."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.b(torch.tanh(F.relu(self.a(x)))).relu()


def named(report):
    return {layer.name: layer for layer in report.layers}


def test_statistics_are_those_of_outputs_and_gradients():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, targets = torch.randn(7, 6).double(), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    report = activation_statistics(model, x, F.cross_entropy, targets=targets)
    hidden = model[:2](x).detach().requires_grad_()
    F.cross_entropy(model[2](hidden), targets).backward()
    tanh = named(report)["1"]
    assert tanh.output.deviation == pytest.approx(hidden.std(correction=0).item())
    assert tanh.output.mean == pytest.approx(hidden.mean().item())
    assert tanh.gradient.deviation == pytest.approx(hidden.grad.std(correction=0).item())
    weight_gradient = named(report)["2"].weight_gradient
    model.zero_grad()
    F.cross_entropy(model(x), targets).backward()
    assert weight_gradient.deviation == pytest.approx(model[2].weight.grad.std(correction=0).item())


def test_model_and_random_state_are_left_as_they_were():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.ReLU(inplace=True))
    model[0].weight.grad = torch.ones(3, 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    activation_statistics(model, torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), torch.sum)
    activation_statistics(model, torch.ones(9, 4), training=False)
    assert model.training and model[2].training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(model[0].weight.grad, torch.ones(3, 4)) and model[0].bias.grad is None
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_model_is_left_as_it_was_after_an_error():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(3, 2))
    with pytest.raises(RuntimeError, match="shapes"):
        activation_statistics(model, torch.randn(5, 4))
    assert model[0].num_batches_tracked == 0 and not model[1]._forward_hooks


@pytest.mark.parametrize(("kind", "bound"), [(nn.Tanh(), 2.2976), (nn.Sigmoid(), 4.5951), (nn.Hardtanh(-2, 2), 1.96)])
def test_saturated_outputs_are_those_near_the_bounds(kind, bound):
    x = torch.tensor([[-9.0, 9, bound + 1e-3, -bound - 1e-3, bound - 1e-3, 1 - bound, 0, 0.5]])
    assert activation_statistics(kind, x).layers[0].saturated == 4 / 8


def test_upper_bound_alone_saturates_relu6():
    assert activation_statistics(nn.ReLU6(), torch.tensor([[-9.0, 7, 1, 2]])).layers[0].saturated == 1 / 4


@pytest.mark.parametrize("layers", [nn, gpukern.nn])
def test_dead_units_are_channels_without_any_output(layers):
    model = layers.Sequential(layers.Conv2d(3, 8, 3), layers.ReLU()) if layers is gpukern.nn else nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU()
    )  # fmt: skip
    with torch.no_grad():
        model[0].bias[:6] = -100
    report = activation_statistics(model, torch.randn(2, 3, 9, 9))
    relu = named(report)["1"]
    assert (relu.units, relu.dead) == (8, 6 / 8)
    assert any("75 % of the units are dead" in finding for finding in report.findings)


def test_units_of_tokens_are_features_and_of_signals_channels():
    x = torch.randn(2, 5, 7).abs() + 1
    x[:, :, 0] = -1  # a feature
    assert activation_statistics(nn.ReLU(), x).layers[0].dead == 1 / 7
    signal = nn.Sequential(nn.Conv1d(5, 5, 1, groups=5, bias=False), nn.ReLU())
    nn.init.ones_(signal[0].weight)
    x = x.abs()
    x[:, 3] = -1
    assert named(activation_statistics(signal, x))["1"].dead == 1 / 5


def test_activation_functions_have_rows():
    report = activation_statistics(Student(), torch.randn(8, 6), torch.sum)
    assert [layer.name for layer in report.layers] == ["a", "relu", "tanh (2)", "b", "relu (3)"]
    assert named(report)["relu"].gradient is not None


def test_function_inside_an_activation_layer_has_no_second_row():
    assert len(activation_statistics(nn.Sequential(nn.ReLU(), nn.Tanh()), torch.randn(3, 4)).layers) == 2


def test_layer_of_another_library_that_calls_an_activation_is_one():
    class Rectifier(nn.Module):
        def forward(self, x):
            return F.relu(x)

    (layer,) = activation_statistics(nn.Sequential(Rectifier()), torch.tensor([[-1.0, 2], [-2, 1]])).layers
    assert (layer.name, layer.type, layer.kind, layer.dead) == ("0", "Rectifier", "ReLU", 0.5)


@pytest.mark.parametrize("inputs", [{"x": torch.randn(8, 6)}, (torch.randn(8, 6),), [torch.randn(8, 6)]])
def test_inputs_may_have_any_structure(inputs):
    assert len(activation_statistics(Student(), inputs).layers) == 5


def test_layers_that_return_several_tensors_are_described_by_the_first():
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.randn(2, 3, 4)
    (layer,) = activation_statistics(attention, (x, x, x)).layers
    assert layer.output.count == 24 and layer.type == "MultiheadAttention"


def test_layer_called_twice_has_one_row():
    shared = nn.Linear(4, 4)
    (layer,) = activation_statistics(nn.Sequential(shared, shared), torch.randn(3, 4)).layers
    assert layer.calls == 2 and layer.output.count == 24


def test_watching_several_batches_gathers_all_of_them():
    model = nn.Linear(4, 2)
    batches = [torch.randn(5, 4), torch.randn(3, 4)]
    with watch_activations(model) as statistics:
        for batch in batches:
            model(batch).sum().backward()
    whole = model(torch.cat(batches)).detach()
    layer = statistics().layers[0]
    assert layer.output.deviation == pytest.approx(whole.std(correction=0).item(), rel=1e-5)
    assert layer.gradient.count == 16 and not model._forward_hooks


def test_unit_that_is_alive_in_one_batch_is_not_dead():
    model = nn.ReLU()
    with watch_activations(model) as statistics:
        for row in ([[1.0, -1, -1, -1]], [[-1.0, -1, 1, -1]]):
            model(torch.tensor(row))
    assert statistics().layers[0].dead == 2 / 4 and statistics().layers[0].observed == 2


@pytest.mark.parametrize(
    ("gain", "said"), [(0.3, "activations shrink"), (30.0, "activations grow"), (1.4, ""), (float("nan"), "NaN")]
)
def test_findings_tell_of_the_trend(gain, said):
    layers = [nn.Linear(64, 64, bias=False) for _ in range(5)]
    for layer in layers:
        layer.weight.data.normal_(std=1 / 8).mul_(gain)
    model = nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())))
    found = " ".join(activation_statistics(model, torch.randn(32, 64)).findings)
    assert said in found and bool(found) == bool(said)


def test_report_prints_a_table_and_json():
    report = activation_statistics(Student(), torch.randn(8, 6), torch.sum)
    assert "tanh (2)" in str(report) and "gradient's" in str(report)
    assert json.loads(report.to_json())["layers"][0]["name"] == "a"


def test_pictures_are_written(tmp_path):
    report = activation_statistics(Student(), torch.randn(8, 6), torch.sum)
    report.plot(tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    dead = activation_statistics(nn.Sequential(nn.ReLU(), nn.ReLU()), -torch.ones(2, 3))
    dead.plot(tmp_path / "dead.svg")
    assert b"<svg" in (tmp_path / "dead.svg").read_bytes()


def test_what_cannot_be_watched_is_refused():
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, got function"):
        activation_statistics(F.relu, torch.ones(1))
    with pytest.raises(DiagnoseError, match="does not depend on any parameter"):
        activation_statistics(nn.ReLU(), torch.ones(2, 2), torch.sum)
    with pytest.raises(DiagnoseError, match="no layer of the model"):
        activation_statistics(nn.Embedding(3, 2).requires_grad_(False), torch.empty(0, dtype=torch.long))
