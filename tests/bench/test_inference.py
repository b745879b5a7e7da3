"""The inference suite beyond its being right: its networks, and against whom they run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bench.accuracy import relative_error
from bench.suite import Selection, Task, suites, tasks
from bench.suites import inference
from bench.suites.inference import folded, trained_alike
from models.zoo import NETWORKS

pytestmark = pytest.mark.usefixtures("reference_mode")

INFERENCE, MODEL = suites()["inference"], suites()["model"]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EVERYONE = ("library", "compile", "max-autotune")


def make(network: str, batch: int = 2, dtype: str = "float16") -> Task:
    (task,) = tasks(INFERENCE, Selection((network,), (batch,), (dtype,), ("channels_last",), ("forward",)))
    return task


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]


# ---- the networks ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return trained_alike("resnet18")


def test_batch_norms_are_such_that_folding_matters(resnet):
    assert len(norms(resnet)) == 20 and not resnet.training
    for norm in norms(resnet):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - norm.running_mean * scale
        assert scale.std() > 0.01 and shift.std() > 0.05 and (norm.running_var > 0).all()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def error(model: nn.Module, images: torch.Tensor) -> float:
    task = make("resnet18", dtype="float32")
    with torch.no_grad():
        return relative_error(model(images), INFERENCE.reference(task, (images,)))


def test_the_independent_fold_leaves_no_batch_norm_and_is_right(resnet, images):
    without = folded(resnet)
    assert not norms(without) and len(norms(resnet)) == 20
    assert error(without, images) <= INFERENCE.bound(make("resnet18", dtype="float32"))


def test_a_fold_that_forgets_something_is_found(resnet, images):
    """In any layer, at the bound of 16 bit: the network is no one in which a batch norm hardly counts."""
    bound = INFERENCE.bound(make("resnet18"))
    for number, forget in ((3, "running_mean"), (10, "bias"), (19, "running_mean")):
        model = copy.deepcopy(resnet)
        getattr(norms(model)[number], forget).data.zero_()
        assert error(model, images) > bound, (number, forget)


def test_a_fold_that_leaves_a_batch_norm_is_no_peer(resnet, monkeypatch):
    monkeypatch.setattr(inference.optimization, "fuse", lambda model: model)
    with pytest.raises(RuntimeError, match=r"torch\.fx did not fold bn1, layer1\.0\.bn1"):
        folded(resnet)


# ---- candidates ------------------------------------------------------------------------------------------------------


def test_every_peer_runs_with_and_without_batch_norms():
    found = INFERENCE.implementations(make("resnet18"), EVERYONE, CUDA)
    each = ("PyTorch", "torch.compile", "torch.compile max-autotune")
    assert [i.name for i in found] == ["gpukern", *(name + fold for name in each for fold in ("", " folded"))]
    assert all(i.name.endswith("folded") == ("folded by torch.fx" in i.setting) for i in found)
    # Where there is nothing to fold it would be the same twice.
    names = [i.name for i in INFERENCE.implementations(make("lenet"), EVERYONE, CUDA)]
    assert names == ["gpukern", *each]


def test_those_with_cuda_graphs_of_their_own_use_them_from_python():
    on_gpu = INFERENCE.implementations(make("resnet18"), EVERYONE, CUDA)
    own = [i.name for i in on_gpu if i.from_python is not None]
    assert own == ["gpukern", "torch.compile max-autotune", "torch.compile max-autotune folded"]
    assert all(("rom Python" in i.setting) == (i.name in own) for i in on_gpu)
    assert not any(i.from_python for i in INFERENCE.implementations(make("resnet18"), EVERYONE, CPU))


def test_gpukern_asks_for_a_cuda_graph_on_a_gpu_only(monkeypatch):
    asked = []

    class Fused:
        module = staticmethod(lambda images: "launches")

        def __call__(self, images):
            return "replayed"

    def fuse(model, example, **options):
        asked.append((example.shape[0], options))
        return Fused()

    monkeypatch.setattr(inference.gpukern, "fuse", fuse)
    task = make("lenet")
    (images,) = INFERENCE.tensors(task, CPU)
    # The images decide where the model goes: on a machine without a GPU that is the CPU, whatever is asked for.
    ours = INFERENCE.implementations(task, (), CUDA)[0]
    assert (ours.function(images), ours.from_python(images)) == ("launches", "replayed")
    assert asked == [(2, {"dtype": torch.float16, "cuda_graph": False, "verify": False})]  # and fused once


def test_folded_is_what_runs_as_folded(monkeypatch):
    compiled = []
    monkeypatch.setattr(inference, "compile_for_these_shapes", lambda model, mode: compiled.append(model) or model)
    task = make("resnet18", 1, "float32")
    (images,) = INFERENCE.tensors(task, CPU)
    plain, without = INFERENCE.implementations(task, ("compile",), CPU)[1:]
    for each in (plain, without):
        each.function(images)
    assert [len(norms(model)) for model in compiled] == [20, 0]


def test_max_autotune_has_its_own_graphs_from_python_alone(monkeypatch):
    modes = []

    def compile_it(model, mode=None):
        modes.append(mode)
        return model

    monkeypatch.setattr(inference, "compile_for_these_shapes", compile_it)
    task = make("lenet", dtype="float32")
    (images,) = INFERENCE.tensors(task, CPU)
    *_, compiled, tuned = INFERENCE.implementations(task, EVERYONE, CUDA)
    results = [compiled.function(images), tuned.function(images), tuned.from_python(images)]
    assert modes == [None, "max-autotune-no-cudagraphs", "max-autotune"]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    tuned.function(images)
    assert len(modes) == 3  # compiled once
    assert not results[0].requires_grad


def test_unless_told_otherwise_it_measures_what_people_ask_for():
    assert set(INFERENCE.networks) <= set(NETWORKS) and INFERENCE.batches == (1, 32, 128)
    assert INFERENCE.dtypes[0] == "float16" and INFERENCE.layouts == ("channels_last",)


# ---- in eight bits ---------------------------------------------------------------------------------------------------


def test_eight_bits_stand_beside_sixteen_alone():
    found = INFERENCE.implementations(make("lenet"), ("fp8", "int8"), CUDA)
    assert [i.name for i in found] == ["gpukern", "gpukern int8", "gpukern fp8"]
    assert found[0].bound is None and found[1].bound == found[2].bound == pytest.approx(10**-0.5)
    assert all(
        i.from_python is not None and f'dtype="{kind}"' in i.setting
        for i, kind in zip(found[1:], ("int8", "fp8"), strict=True)
    )
    assert len(INFERENCE.implementations(make("lenet", dtype="float32"), ("int8", "fp8"), CUDA)) == 1


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_eight_bits_are_right_to_their_bound_and_differ(kind):
    task = make("lenet")
    (images,) = INFERENCE.tensors(task, CPU)
    ours, eight = INFERENCE.implementations(task, (kind,), CPU)
    reference = INFERENCE.reference(task, (images,))
    assert INFERENCE.bound(task) < relative_error(eight.function(images), reference) < eight.bound
    assert relative_error(ours.function(images), reference) <= INFERENCE.bound(task)
