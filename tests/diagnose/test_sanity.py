"""Each planted mistake is named, and a model without mistakes has none."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gpukern
from gpukern.diagnose import DiagnoseError, sanity_check

CLASSES = 4


@pytest.fixture(autouse=True)
def plain(reference_mode):
    """Hundreds of small steps: emulated kernels would take minutes, and threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch(samples: int = 160) -> tuple[torch.Tensor, torch.Tensor]:
    """Images with a bright quarter, which is their class."""
    labels = torch.arange(samples) % CLASSES
    images = 0.7 * torch.randn(samples, 1, 8, 8)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, 4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 2
    return (images - images.mean()) / images.std(), labels


def network(layers=nn) -> nn.Sequential:
    return nn.Sequential(
        layers.Conv2d(1, 6, 3), layers.ReLU(), nn.Flatten(),
        layers.Linear(216, 16), layers.ReLU(), layers.Linear(16, CLASSES),
    )  # fmt: skip


def step(model, optimizer, given):
    optimizer.zero_grad()
    F.cross_entropy(model(given[0]), given[1]).backward()
    optimizer.step()


def judged(model, given=None, loss=F.cross_entropy, **options):
    return sanity_check(model, batch() if given is None else given, loss, **{"steps": 120, **options})


# ---- without a mistake ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [nn, gpukern.nn])
def test_sound_training_passes_every_check(layers):
    model = network(layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-3)
    report = judged(model, optimizer=optimizer, training_step=step)
    assert report.passed and {check.verdict for check in report.checks} == {"ok"}, str(report)
    assert len(report.checks) == 12 and "12 checks, all well" in str(report)


def test_model_optimizer_and_random_states_are_left_as_they_were():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES))
    model[1].eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    given = batch(64)
    step(model, optimizer, given)
    kept = [value.clone() for value in model.state_dict().values()]
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    moments = [value["exp_avg"].clone() for value in optimizer.state.values()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    judged(model, given, optimizer=optimizer, training_step=step, steps=3)
    assert all(map(torch.equal, model.state_dict().values(), kept))
    assert all(torch.equal(parameter.grad, old) for parameter, old in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(value["exp_avg"], old) for value, old in zip(optimizer.state.values(), moments, strict=True))
    assert not model[1].training and model.training
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


def test_model_that_works_on_its_input_in_place_is_judged_by_fresh_batches():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return self.inner(x.mul_(0.5))

    given = batch(32)
    kept = [each.clone() for each in given]
    model = Centred()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    report = judged(model, given, optimizer=optimizer, training_step=step)
    assert all(map(torch.equal, given, kept))
    names = ("gradients", "a handful learned", "training step")
    assert [report[name].verdict for name in names] == ["ok"] * 3, str(report)


def test_loss_that_is_nan_is_told_as_such():
    report = judged(network(), batch(32), loss=lambda output, labels: output.sum() * torch.nan, steps=3)
    assert report["gradients"].finding == "the loss is nan"


def test_regression_of_a_dict_of_inputs_is_checked():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))

        def forward(self, a, b):
            return self.layer(torch.cat([a, b], 1))[:, 0]

    inputs = {"a": torch.randn(200, 3), "b": torch.randn(200, 3)}
    report = judged(Sum(), (inputs, inputs["a"].sum(1)), F.mse_loss, chance=3.0, steps=200)
    assert report.passed and report["labels fit inputs"].verdict == "ok", str(report)
    assert report["loss at chance"].verdict == "ok"


# ---- planted mistakes ----------------------------------------------------------------------------------------


def one_hot(given):
    return given[0], F.one_hot(given[1], CLASSES).float()


def frozen():
    model = network()
    model[3].weight.requires_grad_(False)
    return model


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net[3:](self.net[:3](x).detach())


def dead():
    model = network()
    with torch.no_grad():
        model[3].bias.fill_(-100)
    return model


def shuffled():
    images, labels = batch()
    return images, labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]


def scaled(factor):
    model = network()
    with torch.no_grad():
        model[-1].weight.mul_(factor)
    return model


def nan_images():
    images, labels = batch()
    images[3, 0, 2, 2] = float("nan")
    return images, labels


def twice():
    images, labels = batch()
    images[8:12] = images[4:8]
    return images, torch.cat([labels[:8], (labels[8:12] + 1) % CLASSES, labels[12:]])


#: Model, batch, options; the check that names the mistake, its verdict, its words.
MISTAKES = {
    "shuffled labels": (network, shuffled, {}, "labels fit inputs", "warning", "look shuffled"),
    "constant labels": (
        network, lambda: (batch()[0], torch.full((160,), 2)), {},
        "labels", "wrong", "constant: all are 2",
    ),
    "labels from 1": (network, lambda: (batch()[0], batch()[1] + 1), {}, "labels", "wrong", "1 to 4.*classes 0 to 3"),
    "same input, two labels": (network, twice, {}, "labels", "warning", "4 inputs occur twice"),
    "one class": (
        network, lambda: (batch()[0], torch.eye(160)[0].long()), {},
        "labels", "warning", "always answering 0",
    ),
    "bytes": (
        network, lambda: (40 * batch()[0] + 128, batch()[1]), {},
        "inputs", "wrong", "not normalized: mean 128",
    ),
    "pixels to 1": (network, lambda: (0.2 * batch()[0] + 2, batch()[1]), {}, "inputs", "warning", "not normalized"),
    "NaN": (network, nan_images, {}, "inputs", "wrong", "1 values are NaN"),
    "equal inputs": (
        network, lambda: (batch()[0][:1].expand(160, 1, 8, 8), batch()[1]), {},
        "inputs", "wrong", "the same",
    ),
    "frozen layer": (frozen, batch, {}, "parameters", "warning", "frozen: layer 3 with requires_grad=False"),
    "detached layer": (Detached, batch, {}, "parameters", "wrong", r"frozen: layer net\.0 without a gradient"),
    "dead ReLUs": (dead, batch, {}, "activations", "wrong", "dead ReLUs: 100 % of the units of 4"),
    "softmax twice": (lambda: network().append(nn.Softmax(1)), batch, {}, "loss function", "wrong", "softmax twice"),
    "ReLU at the end": (
        lambda: network().append(nn.ReLU()), batch, {},
        "loss function", "wrong", "applied to the logits",
    ),
    "nll of logits": (
        network, batch, {"loss": F.nll_loss},
        "loss function", "wrong", "wrong loss: nll_loss of logits",
    ),
    "squared errors": (
        network, lambda: one_hot(batch()), {"loss": F.mse_loss},
        "loss function", "warning", "wrong loss",
    ),
    "targets of another kind": (network, batch, {"loss": F.mse_loss}, "loss function", "wrong", "the loss fails"),
    "loss without targets": (
        network, batch, {"loss": lambda o, t: o.square().mean()},
        "loss function", "wrong", "exchanged",
    ),
    "summed loss": (
        network, batch, {"loss": nn.CrossEntropyLoss(reduction="sum")},
        "loss at chance", "warning", "summed",
    ),
    "large logits": (lambda: scaled(60), batch, {}, "loss at chance", "wrong", "begins surely wrong"),
    "negative penalty": (
        network, batch, {"regularization": -0.1},
        "regularization", "wrong", "does not raise the loss",
    ),
    "penalty of .data": (
        network, batch, {"regularization": lambda model: model[0].weight.data.square().sum()},
        "regularization", "wrong", "no gradient",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistake_is_named(mistake):
    make, data, options, name, verdict, said = MISTAKES[mistake]
    check = judged(make(), data(), **{"steps": 1, "entries": 1, **options})[name]
    assert check.verdict == verdict, check
    assert re.search(said, check.finding), check
    assert check.advice or verdict == "warning"


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_broadcast_of_targets_is_named():
    images, labels = batch()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    report = judged(model, (images, labels.float()), F.mse_loss, steps=1)
    assert report["loss function"].verdict == "wrong" and "broadcast" in report["loss function"].finding


def test_sigmoid_twice_is_named():
    images, labels = batch()
    targets = (labels == 0).float()[:, None]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    right = judged(model, (images, targets), F.binary_cross_entropy_with_logits, steps=1)
    assert right["loss function"].verdict == "ok" and "ln 2" in right["loss at chance"].finding
    wrong = judged(model.append(nn.Sigmoid()), (images, targets), F.binary_cross_entropy_with_logits, steps=1)
    assert "sigmoid twice" in wrong["loss function"].finding


def test_log_softmax_before_either_loss_is_right():
    for loss in (F.nll_loss, F.cross_entropy):
        report = judged(network().append(nn.LogSoftmax(1)), loss=loss, steps=1)
        assert report["loss function"].verdict == "ok" and "ln 4" in report["loss at chance"].finding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_loss_is_judged_in_other_dtypes(dtype):
    images, labels = batch()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)).to(dtype)
    report = judged(model, (images.to(dtype), labels), steps=1)
    assert report["loss function"].verdict == "ok" and "ln 4" in report["loss at chance"].finding
    report = judged(nn.Sequential(model, nn.Softmax(1)), (images.to(dtype), labels), steps=1)
    assert "softmax twice" in report["loss function"].finding
    report = judged(nn.Sequential(model, nn.LogSoftmax(1)), (images.to(dtype), labels), F.nll_loss, steps=1)
    assert report["loss function"].verdict == "ok"


def test_normalization_inside_of_the_model_counts():
    images, labels = batch()
    model = nn.Sequential(nn.BatchNorm2d(1), *network())
    check = judged(model, (40 * images + 128, labels), steps=1)["inputs"]
    assert check.verdict == "ok" and "the model normalizes them" in check.finding


def test_features_of_different_scales_are_named():
    features = torch.randn(160, 3) * torch.tensor([1.0, 0.9, 0.001])
    report = judged(nn.Linear(3, 4), (features, batch()[1]), steps=1)
    assert "features deviate by" in report["inputs"].finding


# ---- the user's step -----------------------------------------------------------------------------------------


def without_zero_grad(model, optimizer, given):
    F.cross_entropy(model(given[0]), given[1]).backward()
    optimizer.step()


def without_backward(model, optimizer, given):
    optimizer.zero_grad()
    F.cross_entropy(model(given[0]), given[1])
    optimizer.step()


def zeroed_too_late(model, optimizer, given):
    F.cross_entropy(model(given[0]), given[1]).backward()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()


def without_step(model, optimizer, given):
    optimizer.zero_grad()
    F.cross_entropy(model(given[0]), given[1]).backward()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (without_zero_grad, "missing zero_grad"),
        (without_backward, "zero or missing"),
        (zeroed_too_late, "zero or missing"),
        (without_step, "step\\(\\) is never called"),
        (lambda model, optimizer, given: model.nothing, "it fails: AttributeError"),
    ],
)
def test_mistake_in_the_training_step_is_named(wrong, said):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES), nn.Dropout(0.2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    check = judged(model, optimizer=optimizer, training_step=wrong, steps=1, entries=1)["training step"]
    assert check.verdict == "wrong"
    assert re.search(said, check.finding), check


def test_step_that_trains_another_model_is_named_and_undone():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = model[1].weight.detach().clone()
    report = judged(model, optimizer=optimizer, training_step=lambda m, o, b: step(model, optimizer, b), steps=1)
    assert "another model" in report["training step"].finding and torch.equal(model[1].weight, before)


def test_parameters_outside_of_the_optimizer_are_named():
    model = network()
    optimizer = torch.optim.SGD(model[:4].parameters(), lr=0.01)
    check = judged(model, optimizer=optimizer, steps=1)["parameters"]
    assert check.verdict == "wrong" and "layer 5 not in the optimizer" in check.finding


@pytest.mark.parametrize(("rate", "advice"), [(1e-7, "larger"), (10.0, "smaller"), (1e-3, "")])
def test_updates_are_compared_with_the_weights(rate, advice):
    model = network()
    report = judged(model, optimizer=torch.optim.Adam(model.parameters(), lr=rate), steps=1)
    assert advice in report["updates"].advice and bool(advice) == (report["updates"].verdict != "ok")
    exact = network()
    exact.load_state_dict(model.state_dict())
    assert set(report.measured.updates) == {"0.weight", "3.weight", "5.weight"}


def test_ratio_of_updates_is_that_of_norms():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES, bias=False)).double()
    images, labels = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    found = judged(model, (images.double(), labels), optimizer=optimizer, steps=1).measured.updates["1.weight"]
    ratios = []
    for _ in range(5):
        before = model[1].weight.detach().clone()
        step(model, optimizer, (images.double(), labels))
        ratios.append(((model[1].weight - before).norm() / before.norm()).item())
    assert found == pytest.approx(sum(ratios) / 5, rel=1e-9)


# ---- gradients and a handful ---------------------------------------------------------------------------------


class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2.01


class Layer(nn.Module):
    def forward(self, x):
        return Wrong.apply(x)


def test_wrong_backward_is_found_and_the_layers_before_it_are_named():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Layer(), nn.Linear(8, CLASSES))
    report = judged(model, steps=1)
    assert report["gradients"].verdict == "wrong" and "1.weight" in report["gradients"].advice
    assert "3.weight" not in report["gradients"].advice
    assert report["gradients"].finding.count("derivatives are wrong") == 1


def test_spectral_norm_is_differentiated_without_its_iteration():
    spectral = nn.utils.parametrizations.spectral_norm
    report = judged(nn.Sequential(nn.Flatten(), spectral(nn.Linear(64, CLASSES))), batch(32), steps=3)
    assert report["gradients"].verdict == "ok", str(report)


def test_kinks_are_left_out():
    """All inputs of the ReLU are 0: the derivative on one side is not that on the other."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    report = judged(model, steps=1)
    assert report["gradients"].verdict == "ok" and "left out" in report["gradients"].finding


def test_dropout_and_batch_norm_do_not_disturb_the_differences():
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, CLASSES)
    )
    report = judged(model, steps=1)
    assert report["gradients"].verdict == "ok" and len(report.measured.derivatives) >= 6
    assert max(entry.error for entry in report.measured.derivatives) < 1e-5


def test_model_of_one_dtype_is_not_checked_in_float64():
    class Single(nn.Linear):
        def forward(self, x):
            return super().forward(x).float()

    report = judged(nn.Sequential(nn.Flatten(), Single(64, CLASSES)), steps=1)
    assert report["gradients"].verdict == "not checked" and "another dtype" in report["gradients"].finding


def test_what_has_no_capacity_does_not_learn_a_handful():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(CLASSES))

        def forward(self, x):
            return self.bias.expand(len(x), CLASSES)

    check = judged(Constant(), steps=40)["a handful learned"]
    assert check.verdict == "wrong" and "not learned" in check.finding


def test_layers_that_drop_samples_do_not_keep_a_handful_from_being_learned():
    class DropPath(nn.Module):
        def forward(self, x):
            keep = torch.rand(len(x), 1) > 0.5
            return x * keep if self.training else x

    for drop in (DropPath(), nn.Dropout(0.95)):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), drop, nn.Linear(32, CLASSES))
        assert judged(model)["a handful learned"].verdict == "ok"


def test_label_smoothing_has_a_floor():
    check = judged(network(), loss=nn.CrossEntropyLoss(label_smoothing=0.2), steps=100)["a handful learned"]
    assert check.verdict == "warning" and "label smoothing" in check.advice


# ---- reports and refusals ------------------------------------------------------------------------------------


def test_report_has_json_and_a_picture(tmp_path):
    model = network()
    report = judged(model, optimizer=torch.optim.Adam(model.parameters()), steps=3)
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads(report.to_json(tmp_path / "report.json"))
    assert [check["name"] for check in told["checks"]] == [check.name for check in report.checks]
    assert json.loads((tmp_path / "report.json").read_text()) == told
    judged(model, loss=lambda output, targets: None, steps=1).plot(tmp_path / "nothing.png")
    with pytest.raises(KeyError, match="'absent' is no check: there are inputs, labels"):
        report["absent"]


@pytest.mark.parametrize(
    ("given", "options", "error", "said"),
    [
        (torch.zeros(3), {}, TypeError, r"a pair \(inputs, targets\), got Tensor"),
        ((1, 2, 3), {}, TypeError, "got 3 values"),
        (("a", "b"), {}, TypeError, "no tensor with a batch dimension"),
        ((torch.zeros(0, 1, 8, 8), torch.zeros(0)), {}, ValueError, "the batch is empty"),
        (
            (torch.zeros(4, 3), torch.zeros(4)),
            {},
            DiagnoseError,
            "the model fails for the inputs of the batch: RuntimeError",
        ),
        (None, {"steps": 0}, ValueError, "at least 1"),
        (None, {"training_step": step}, ValueError, "training_step needs an optimizer"),
    ],
)
def test_what_cannot_be_checked_is_refused(given, options, error, said):
    with pytest.raises(error, match=said):
        judged(network(), given, **options)
