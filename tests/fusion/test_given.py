"""Models that keep what has no copy, or lack what fusing needs: fused all the same, or refused in words."""

from __future__ import annotations

import collections
import dataclasses
import threading

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import gpukern
from gpukern.cli import app
from gpukern.fusion import FusionError
from gpukern.fusion.given import devices_of
from tests.fusion.networks import NORM, conv, norm, one

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("reference_mode"),
]


# ---- what a model keeps ----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Record:
    kept: object


class Slotted:
    __slots__ = ("kept",)

    def __init__(self, kept):
        self.kept = kept


class Hook:
    """Bound to the model by its method alone."""

    def __call__(self, module, inputs, output):
        self.kept = output


def hooked(model, kept):
    hook = Hook()
    hook.kept = kept
    model.a.register_forward_hook(hook)


def summed(kept):
    loss = kept.sum()
    loss.backward(retain_graph=True)
    return loss


KEEPERS = {
    "a list": lambda model, kept: setattr(model, "seen", [kept]),
    "dicts of tuples": lambda model, kept: setattr(model, "seen", {"a": {1: (kept, kept)}}),
    "a defaultdict of deques": lambda model, kept: setattr(
        model, "seen", collections.defaultdict(list, a=collections.deque([kept]))
    ),
    "a dataclass": lambda model, kept: setattr(model.b, "seen", Record([kept])),
    "slots": lambda model, kept: setattr(model, "seen", Slotted(kept)),
    "the object of a hook": hooked,
    "a loss": lambda model, kept: setattr(model, "losses", [summed(kept)]),
    "a parameter": lambda model, kept: setattr(model.a.weight, "kept", kept),
    "a lock": lambda model, kept: setattr(model, "lock", threading.Lock()),
    "an event": lambda model, kept: setattr(model.b, "ready", threading.Event()),
    "a module of Python": lambda model, kept: setattr(model, "F", torch.nn.functional),
}


@pytest.mark.parametrize("where", KEEPERS)
def test_what_a_model_keeps_is_in_nobodys_way(where):
    model, (x,) = one()
    KEEPERS[where](model, model.a(x))
    with torch.no_grad():
        expected = model(x)
    fused = gpukern.fuse(model, x)
    assert [group.pattern for group in fused.report.fused] == [NORM]
    assert (fused(x) - expected).norm() < 1e-6 * expected.norm()
    assert torch.equal(gpukern.convert(model)(x), expected)


def test_what_was_kept_stays_as_it_was():
    model, (x,) = one()
    kept = model.a(x)
    model.seen, before = [kept], kept.clone()
    gpukern.fuse(model, x)
    gpukern.convert(model)(x)
    assert model.seen[0] is kept and kept.grad_fn is not None and torch.equal(kept, before)


class NoCopies:
    def __deepcopy__(self, memo):
        raise ValueError("there is one of me")


@pytest.mark.parametrize(
    "name, held",
    [("stream", (n for n in range(3))), ("streams", [(n for n in range(3))]), ("only", NoCopies())],
    ids=["a generator", "a list of generators", "an object"],
)
def test_what_has_no_copy_is_named(name, held):
    model, x = one()
    setattr(model.b, name, held)
    with pytest.raises(FusionError, match=rf"cannot be copied: there is no copy of its attribute 'b.{name}', a "):
        gpukern.fuse(model, x)


# ---- what a model lacks ----------------------------------------------------------------------------------------------


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(conv(), norm()).eval()


def with_buffer(buffer: torch.Tensor) -> nn.Module:
    model, _ = one()
    model.b.register_buffer("held", buffer)
    return model


def with_sparse_weight() -> nn.Module:
    model = nn.Sequential(conv(), nn.Linear(7, 7))
    model[1].weight = nn.Parameter(torch.eye(7).to_sparse())
    return model.eval()


def with_quantized_layer() -> nn.Module:
    model = nn.Sequential(conv(), nn.Linear(7, 7)).eval()
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


LACKING = {
    "meta weights": (on_meta, r"the model has no weights: 0.weight is on the meta device"),
    "a meta buffer": (lambda: with_buffer(torch.empty(3, device="meta")), r"b.held is on the meta device"),
    "lazy layers": (lambda: nn.Sequential(nn.LazyConv2d(4, 3)).eval(), r"lazy layers.*0.weight"),
    "a lazy norm": (lambda: nn.Sequential(conv(), nn.LazyBatchNorm2d()).eval(), r"lazy layers.*1.weight"),
    "a sparse weight": (with_sparse_weight, r"1.weight of the model is sparse or packed \(torch.sparse_coo\)"),
    "a sparse buffer": (lambda: with_buffer(torch.eye(3).to_sparse_csr()), r"b.held of the model is sparse"),
    "a quantized buffer": (
        lambda: with_buffer(torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8)),
        r"b.held of the model is quantized \(torch.qint8\)",
    ),
    "a quantized layer": (with_quantized_layer, r"1 is a quantized layer \(Linear\)"),
    "TorchScript": (lambda: torch.jit.trace(*one()), r"the model is compiled by TorchScript"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", LACKING)
def test_what_a_model_lacks_is_named(what):
    make, words = LACKING[what]
    with pytest.raises(FusionError, match=words):
        gpukern.fuse(make(), torch.randn(2, 4, 7, 7))


def test_an_example_without_values_is_refused():
    model, (x,) = one()
    with pytest.raises(FusionError, match="the example is on the meta device"):
        gpukern.fuse(model, x.to("meta"))
    with pytest.raises(FusionError, match="the example is sparse or quantized"):
        gpukern.fuse(model, x.to_sparse())


def test_devices_that_differ_are_told_of():
    """Without a GPU: of a model whose weights are not where the example is."""
    model = on_meta()
    assert devices_of(model, [torch.zeros(2), 3]) == "the example is on cpu, of the model's tensors 0.weight on meta"
    assert devices_of(one()[0], [torch.zeros(2)]) == ""


# ---- from the command line -------------------------------------------------------------------------------------------


class Raises(nn.Module):
    """Of no kind that fusing expects."""

    def forward(self, x):
        raise KeyError("tokens")


def raises() -> nn.Module:
    return Raises()


def keeps_generator() -> nn.Module:
    model, _ = one()
    model.stream = (n for n in range(3))
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "factory, status, words",
    [
        ("on_meta", 1, "0.weight is on the meta device"),
        ("with_sparse_weight", 1, "1.weight of the model is sparse"),
        ("with_quantized_layer", 1, "1 is a quantized layer"),
        ("keeps_generator", 1, "no copy of its attribute 'stream'"),
        ("raises", 2, "the model does not take 2×4×7×7: KeyError: 'tokens'"),
    ],
)
def test_a_command_line_has_no_traceback(factory, status, words):
    asked = ["fuse", f"tests.fusion.test_given:{factory}", "--input", "2,4,7,7", "--device", "cpu"]
    result = CliRunner().invoke(app, asked, env={"COLUMNS": "300"})
    assert result.exit_code == status and words in result.output, result.output
    assert isinstance(result.exception, SystemExit)


def test_a_command_line_says_what_nothing_expects(monkeypatch):
    from gpukern.fusion import pipeline

    def fail(*given, **options):
        raise LookupError("of a kind of its own\nwith details")

    monkeypatch.setattr(pipeline, "find", fail)
    asked = ["fuse", "tests.fusion.made_up:tiny", "--input", "2,3,8,8", "--device", "cpu"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "gpukern fuse: the model cannot be fused: LookupError: of a kind of its own\n" in result.output


# ---- what torch.export made ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [False, True], ids=["captured", "loaded"])
def test_an_exported_program_is_fused_and_summarized(saved, tmp_path):
    model = nn.Sequential(conv(), norm(), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    x = torch.randn(4, 4, 6, 6)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    if saved:
        torch.export.save(exported, tmp_path / "model.pt2")
        exported = torch.export.load(tmp_path / "model.pt2")
    fused = gpukern.fuse(exported.module(), x)
    assert fused.report.fused[0].pattern == "conv2d + batch_norm + relu"
    assert not any("training" in note for note in fused.report.notes)
    for batch in (4, 2, 7):
        given = torch.randn(batch, 4, 6, 6)
        torch.testing.assert_close(fused(given), model(given), rtol=1e-4, atol=1e-5)
    assert gpukern.summary(exported.module(), x).multiply_adds == gpukern.summary(model, x).multiply_adds


def test_a_program_exported_in_training_is_refused_as_random():
    model = nn.Sequential(conv(), nn.Dropout()).train()
    x = torch.randn(2, 4, 6, 6)
    with pytest.raises(FusionError, match=r"does not repeat itself.*native_dropout"):
        gpukern.fuse(torch.export.export(model, (x,)).module(), x)


# ---- what is around a model, and what it does to its input -----------------------------------------------------------


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_model_in_distributed_data_parallel_is_fused(process_group):
    model, x = nn.Sequential(conv(), norm(), nn.ReLU()).eval(), torch.randn(2, 4, 6, 6)
    fused = gpukern.fuse(nn.parallel.DistributedDataParallel(model), x)
    assert fused.report.fused[0].modules == ("0", "1", "2")
    torch.testing.assert_close(fused(x), model(x).detach(), rtol=1e-4, atol=1e-5)


class WritesIntoItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = conv()

    def forward(self, image):
        return self.a(image.relu_())


def test_an_input_that_the_model_changes_stays_and_that_is_said():
    model, x = WritesIntoItsInput().eval(), torch.randn(2, 4, 6, 6)
    given = x.clone()
    fused = gpukern.fuse(model, x.clone())
    assert "The fused model does not write into image, which the model does in forward" in fused.report.notes
    torch.testing.assert_close(fused(given), model(x.clone()).detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(given, x)
