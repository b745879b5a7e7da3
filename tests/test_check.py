"""``gpukern.check`` and ``gpukern check``: right models keep their bounds, and a planted fault is named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import gpukern
from gpukern.checking import CheckError
from gpukern.checking.report import CheckReport
from gpukern.checking.values import OURS, TORCH
from gpukern.cli import app
from gpukern.runtime.mode import Mode, force_mode

LAYERS = {"conv", "norm", "relu", "pool", "act", "fc"}


class Net(torch.nn.Module):
    """A residual block with layers used in place and twice, dropout, and a weight used outside of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.relu = torch.nn.ReLU(inplace=True)
        self.pool = torch.nn.MaxPool2d(2)
        self.head = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 1), torch.nn.ReLU(), torch.nn.Dropout(0.5))
        self.act = torch.nn.SiLU()
        self.fc = torch.nn.Linear(8, 5)
        self.extra = torch.nn.Linear(5, 5)
        self.scale = torch.nn.Parameter(torch.ones(5))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.pool(self.relu(self.norm(self.conv(x))))
        x = self.act(self.act(x + self.head(x)).mean((2, 3)))
        y = torch.nn.functional.dropout(self.fc(x), 0.5, self.training)
        return {"classes": torch.nn.functional.linear(y, self.extra.weight) * self.scale, "features": x}


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 9, 7)


@pytest.mark.parametrize("dtype, training", [(torch.float32, True), (torch.float16, True), (torch.float16, False)])
def test_kernels_keep_their_bounds(dtype, training, images, device):
    """On the GPU, or emulated; the fp32 products are TF32, as torch has it by default."""
    model = Net().to(device)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = gpukern.check(model, images.to(device), dtype=dtype, training=training, channels_last=training)
    ours = [each for each in report.findings if each.by == OURS]
    assert not ours, report
    found = {layer.name: layer for layer in report.layers}
    assert LAYERS | {"head.0 + 1"} <= set(found) and found["act"].calls == 2
    for name in LAYERS - {"relu", "pool", "act"}:
        names = {each.name for each in found[name].tensors}
        assert {"output", "input gradient", "output gradient", "weight gradient", "bias gradient"} - names <= (
            {"input gradient"} if name == "conv" else set()
        )
    assert {"running_mean", "running_var"} <= {each.name for each in found["norm"].tensors} or not training
    assert all(error.error is not None for each in found["conv"].tensors[:2] for error in (each.alone, each.in_model))
    outside = {layer.name: [each.name for each in layer.tensors] for layer in report.layers if not layer.calls}
    assert outside == {"(the model)": ["scale gradient"], "extra": ["weight gradient"]}
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class _Scaled(torch.autograd.Function):
    """A linear layer whose weight gradient is wrong in all dtypes but float64, by ``factor``."""

    @staticmethod
    def forward(ctx, input, weight, factor):
        ctx.save_for_backward(input, weight)
        ctx.factor = factor
        return input @ weight.mT

    @staticmethod
    def backward(ctx, grad):
        input, weight = ctx.saved_tensors
        return grad @ weight, grad.mT @ input * (1.0 if input.dtype is torch.float64 else ctx.factor), None


def linears() -> torch.nn.Sequential:
    layers = [torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 6, bias=False), torch.nn.Linear(6, 4)]
    return torch.nn.Sequential(*layers)


@pytest.fixture
def faulty(monkeypatch):
    """``plant(kind, compute)`` gives the layers of six features without a bias another forward."""

    def plant(kind, compute) -> None:
        right = kind.forward

        def forward(self, input):
            return compute(self, input) if self.bias is None else right(self, input)

        monkeypatch.setattr(kind, "forward", forward)

    return plant


def nan(layer, input):
    output = input @ layer.weight.mT
    return output if output.dtype is torch.float64 else output * torch.where(output == output.max(), math.nan, 1.0)


@pytest.mark.parametrize("kind, by", [(torch.nn.Linear, TORCH), (gpukern.nn.Linear, OURS)])
@pytest.mark.parametrize(
    "compute, tensor, share",
    [(lambda layer, x: _Scaled.apply(x, layer.weight, 1.01), "weight gradient", 1.0), (nan, "output", math.inf)],
)
def test_a_planted_fault_is_named(kind, by, compute, tensor, share, faulty, reference_mode):
    faulty(kind, compute)
    report = gpukern.check(linears(), torch.randn(5, 6))
    assert not report.passed
    assert {(each.layer, each.by, each.alone) for each in report.findings} == {("2", by, True)}
    found = next(each for each in report.findings if each.tensor == tensor)
    assert found.share >= share and f"2: {tensor} by {by}, alone" in str(report)


def test_a_fault_in_the_model_alone_is_named_where_it_begins(monkeypatch, reference_mode):
    """Layers that err only beside the others, as those that read what another left in memory."""
    calls = []

    def forward(self, input):
        calls.append(self)
        whole = calls.count(self) > 1  # not in the layer's own call
        return torch.nn.functional.linear(input, self.weight, self.bias) * (1.01 if whole else 1.0)

    monkeypatch.setattr(gpukern.nn.Linear, "forward", forward)
    monkeypatch.setattr(gpukern.nn.Linear, "_compute", lambda self, x, **_: torch.nn.Linear.forward(self, x).tanh())
    report = gpukern.check(linears(), torch.randn(5, 6))
    assert [(each.layer, each.tensor, each.by, each.alone) for each in report.findings] == [
        ("2", "output", OURS, False)
    ]


def test_a_right_layer_of_a_users_own_keeps_its_bounds(reference_mode):
    class Attention(torch.nn.Module):
        def forward(self, x):
            return torch.softmax(x @ x.mT, 1) @ x

    report = gpukern.check(torch.nn.Sequential(torch.nn.Linear(6, 6), Attention()), torch.randn(5, 6))
    (attention,) = (each for each in report.layers if each.type == "Attention")
    assert report.passed and attention.reason and attention.worst("alone").share > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_cancel_or_keep_a_rounded_output_keep_their_bounds(dtype, reference_mode):
    kinds = (torch.nn.GELU(), torch.nn.Softmax(1), torch.nn.LogSoftmax(1), torch.nn.Tanh(), torch.nn.Hardswish())
    for layer in (*kinds, torch.nn.ReLU6(), torch.nn.AvgPool1d(3), torch.nn.MaxPool1d(2), torch.nn.GroupNorm(2, 8)):
        x = (3 * torch.randn(5, 8, 40)).requires_grad_()
        report = gpukern.check(torch.nn.Sequential(layer), x, dtype=dtype)
        assert not [each for each in report.findings if each.by == OURS], report
        assert report.layers[0].worst("alone", "input gradient").share is not None


@pytest.mark.parametrize("places", [(0, 1, 2, 1), (0, 1, 0, 1, 0), (3, 1, 3)], ids=str)
def test_layers_with_several_places_in_a_sequential_are_judged_alone(places, reference_mode):
    layers = torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 6), torch.nn.LayerNorm(6)
    report = gpukern.check(torch.nn.Sequential(*(layers[place] for place in places)), torch.randn(2, 4, 6))
    assert report.passed, report
    assert sorted(layer.calls for layer in report.layers) == sorted(map(places.count, set(places)))


def test_the_callers_modes_do_not_matter(reference_mode):
    """Without gradients, in inference mode, and under autocast; frozen weights have a gradient of the input."""
    model = linears().requires_grad_(False)
    with torch.inference_mode(), torch.autocast("cpu"):
        report = gpukern.check(model, torch.randn(5, 6))
    assert report.passed and all(layer.worst("alone", "input gradient").share for layer in report.layers)


def test_layers_of_gpukern_are_compared_with_torchs(monkeypatch, reference_mode):
    """A model that is converted already is checked as the original would be."""
    right, called = torch.nn.Linear.forward, []
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: (called.append(self), right(self, x))[1])
    model = gpukern.convert(linears())
    assert gpukern.check(model, torch.randn(5, 6)).passed
    assert {type(each) for each in called} == {torch.nn.Linear}


def test_large_gradients_fit_into_float16(reference_mode):
    """A sum over 70,000 positions exceeds 65,504, and is scaled as a loss would be."""
    model = torch.nn.Conv2d(1, 1, 1)
    torch.nn.init.ones_(model.weight)
    report = gpukern.check(model, torch.rand(1, 1, 300, 300) + 1, dtype=torch.float16)
    assert all(math.isfinite(each.in_model.error) for each in report.layers[0].tensors if each.in_model.error)


@pytest.mark.parametrize(
    "model, inputs, options, error, message",
    [
        ("net", torch.ones(1), {}, TypeError, "torch.nn.Module, got str"),
        (torch.nn.ReLU(), torch.ones(1), {"kwargs": 3}, TypeError, "kwargs must be a dict"),
        (torch.nn.ReLU(), torch.ones(1), {"dtype": torch.float64}, ValueError, "got torch.float64"),
        (torch.nn.ReLU(), torch.ones(1, dtype=torch.long), {}, CheckError, "no weights"),
        (torch.nn.Linear(3, 3), torch.ones(2, 4), {}, CheckError, "fails in float64: RuntimeError"),
        (torch.nn.Linear(3, 3), torch.full((2, 3), math.inf), {}, CheckError, "nothing finite"),
        (torch.nn.Linear(3, 3, device="meta"), torch.ones(2, 3), {}, CheckError, "on the meta device"),
    ],
)
def test_what_cannot_be_checked_is_refused(model, inputs, options, error, message):
    with pytest.raises(error, match=message):
        gpukern.check(model, inputs, **options)


# ---- the report and the command --------------------------------------------------------------------------------------


def run(*words: object):
    words = tuple(map(str, words))
    with force_mode(Mode.REFERENCE):
        return CliRunner().invoke(app, ["check", *words], env={"COLUMNS": "200"})


def test_the_command_writes_all_that_was_asked_for(tmp_path):
    page, values = tmp_path / "out.html", tmp_path / "out.json"
    result = run(f"{__name__}:linears", "--input", "5,6", "--device", "cpu", "--report", page, "--json", values)
    assert result.exit_code == 0, result.output
    found = CheckReport.from_json(values.read_text("utf-8"))
    assert found.passed and found.training and found.dtype == "float32" and str(found) in result.output
    assert page.read_text("utf-8").count("<circle") > 2 * len(found.layers)
    assert json.loads(values.read_text("utf-8"))["passed"] is True
    with pytest.raises(ValueError, match="not a 'gpukern check report"):
        CheckReport.from_json("{}")


def test_a_fault_is_the_exit_status(faulty, tmp_path):
    faulty(gpukern.nn.Linear, nan)
    values = tmp_path / "out.json"
    options = ("--dtype", "bf16", "--eval", "--channels-last", "--json", values, "--report", tmp_path / "page.html")
    result = run(f"{__name__}:linears", "--input", "5,6", "--device", "cpu", *options)
    assert result.exit_code == 1 and "✗ 2: output by gpukern, alone" in result.output
    found = CheckReport.from_json(values.read_text("utf-8"))
    assert (found.dtype, found.training, found.channels_last, found.passed) == ("bfloat16", False, True, False)
    assert Path(tmp_path / "page.html").read_text("utf-8").count('class="found"') == 1


@pytest.mark.parametrize(
    "words, status, message",
    [
        ((f"{__name__}:linears", "--input", "5,7"), 1, "fails in float64"),
        ((f"{__name__}:nothing", "--input", "5,6"), 2, "is not there"),
        ((f"{__name__}:linears", "--input", "5,6", "--dtype", "fp8"), 2, "no dtype is called 'fp8'"),
        ((f"{__name__}:linears", "--input", "5;6"), 2, "is no shape"),
        ((f"{__name__}:linears", "--input", "5,6", "--report", "no/such.html"), 2, "there is no folder"),
    ],
)
def test_wrong_words_are_told(words, status, message):
    result = run(*words, "--device", "cpu")
    assert result.exit_code == status and message in result.output


@pytest.mark.parametrize("zeros, said", [(False, ""), (True, "1 layer gets a gradient of zeros, which proves nothing")])
def test_gradients_that_are_zeros_are_told_of(zeros, said):
    """As before a head that begins with zeros, in vision transformers."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    if zeros:
        torch.nn.init.zeros_(model[2].weight)
    report = gpukern.check(model, torch.randn(3, 4))
    told = [note for note in report.notes if "gradient of zeros" in note]
    assert report.passed and len(told) == zeros and all(note.startswith(said) for note in told)
