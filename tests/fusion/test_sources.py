"""Models by name, weights from files, and what is said of those that are not right."""

from __future__ import annotations

import inspect
import sys
import types

import pytest
import torch
from torch import nn

from gpukern.fusion import sources
from gpukern.fusion.errors import WeightsWarning
from gpukern.fusion.report import IN_ARCHIVE
from gpukern.fusion.sources import SourceError, load_model, load_weights, saved_report, shape_called
from models import checkpoint
from models.lenet import LeNet5
from tests.fusion.made_up import report, tiny

TINY = "tests.fusion.made_up:tiny"


@pytest.fixture(scope="module")
def state():
    return {
        name: torch.randn_like(value) if value.is_floating_point() else value
        for name, value in tiny().state_dict().items()
    }


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], value) for name, value in state.items())


def zoo(monkeypatch, name: str, **contents) -> None:
    """A package of models in place of the real one, which need not be installed."""
    module = types.ModuleType(name)
    for key, value in contents.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)
    if "." in name:
        monkeypatch.setitem(sys.modules, name.partition(".")[0], types.ModuleType(name.partition(".")[0]))


def torchvision_with(monkeypatch, get_model, names, builder) -> None:
    """Whose models are all built by a function like ``builder``."""
    parts = {"list_models": lambda: names, "get_model": get_model, "get_model_builder": lambda name: builder}
    zoo(monkeypatch, "torchvision.models", **parts)


# ---- names ---------------------------------------------------------------------------------------------------------


def test_a_factory_is_called_and_what_it_makes_is_in_evaluation_mode():
    model = load_model(TINY)
    assert isinstance(model, nn.Sequential) and not any(module.training for module in model.modules())


def test_a_model_zoo_is_asked_without_its_own_weights(monkeypatch):
    asked = []

    def get_model(name, **given):
        asked.append((name, given))
        return tiny()

    torchvision_with(monkeypatch, get_model, ["resnet18", "resnet50"], lambda weights=None, progress=True: None)
    zoo(monkeypatch, "timm", list_models=lambda: ["resnet50"], create_model=get_model)
    assert isinstance(load_model("torchvision:resnet50"), nn.Sequential)
    assert isinstance(load_model("timm:resnet50.a1_in1k"), nn.Sequential)
    assert asked == [("resnet50", {"weights": None}), ("resnet50.a1_in1k", {"pretrained": False})]
    with pytest.raises(SourceError, match=r"torchvision has no model 'resnet51'; there is resnet50, resnet18"):
        load_model("torchvision:resnet51")
    with pytest.raises(SourceError, match=r"timm has no model 'xyz'$"):
        load_model("timm:xyz")


@pytest.mark.parametrize("argument", ["weights_backbone", "weights_encoder"])
def test_no_part_of_a_zoos_model_asks_for_weights_of_its_own(monkeypatch, argument):
    """torchvision's segmentation and detection models fetch a backbone's weights unless that is declined too."""
    asked = []

    def builder(*, weights=None, progress=True, num_classes=None, **given):
        raise AssertionError

    signature = inspect.signature(builder)
    extra = inspect.Parameter(argument, inspect.Parameter.KEYWORD_ONLY, default="IMAGENET1K_V1")
    builder.__signature__ = signature.replace(parameters=[*list(signature.parameters.values())[:-1], extra])
    torchvision_with(monkeypatch, lambda name, **given: asked.append(given) or tiny(), ["fcn_resnet50"], builder)
    load_model("torchvision:fcn_resnet50")
    assert asked == [{"weights": None, argument: None}]


@pytest.mark.parametrize("name", ["fcn_resnet50", "lraspp_mobilenet_v3_large", "ssd300_vgg16"])
def test_torchvision_fetches_nothing(monkeypatch, name):
    pytest.importorskip("torchvision")
    from torchvision.models import _api

    def refuse(url, **_):
        raise AssertionError(f"asked for {url}")

    monkeypatch.setattr(_api, "load_state_dict_from_url", refuse)
    with torch.device("meta"):
        assert isinstance(load_model(f"torchvision:{name}"), nn.Module)


def test_weights_that_come_with_an_option_of_the_model(monkeypatch, tmp_path):
    """Of torchvision's GoogLeNet and Inception: the file says nothing of it, and the results would be others."""

    def get_model(name, **given):
        model = tiny()
        model.transform_input = False
        return model

    torchvision_with(monkeypatch, get_model, ["googlenet"], lambda weights=None: None)
    torch.save(tiny().state_dict(), tmp_path / "googlenet.pth")
    with pytest.warns(WeightsWarning, match="torchvision:googlenet is made with transform_input=False"):
        load_model("torchvision:googlenet", tmp_path / "googlenet.pth")


def test_a_model_that_the_zoo_cannot_make(monkeypatch):
    def get_model(name, **given):
        raise TypeError("needs scipy")

    torchvision_with(monkeypatch, get_model, ["inception"], lambda weights=None: None)
    with pytest.raises(SourceError, match="torchvision:inception cannot be made: TypeError: needs scipy"):
        load_model("torchvision:inception")


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_package_that_is_not_there_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.models", None)
    with pytest.raises(SourceError, match=f"pip install {package}"):
        load_model(f"{package}:resnet50")


def test_a_package_that_does_not_fit_is_not_to_be_installed_again(monkeypatch, tmp_path):
    (tmp_path / "timm.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(SourceError, match=r"built for another PyTorch: RuntimeError: operator .* does not exist$"):
        load_model("timm:resnet50")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("resnet50", "'resnet50' names no model: expected torchvision:NAME"),
        ("no.such.package:factory", "is not there: No module named 'no'"),
        ("tests.fusion.made_up:nothing", "is not there: .*has no attribute 'nothing'"),
        ("tests.fusion.made_up:CHECK", "fails: TypeError"),
        ("tests.fusion.made_up:broken", "fails: RuntimeError: no such disk"),
        ("tests.fusion.made_up:report", "makes a FusionReport, expected a torch.nn.Module"),
        ("nowhere.pt2", "there is no file nowhere.pt2"),
        ("nowhere.pt", "there is no file nowhere.pt"),
        ("", "names no model"),
    ],
)
def test_names_of_no_model(name, complaint):
    with pytest.raises(SourceError, match=complaint):
        load_model(name)


# ---- .pt2 ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported():
    return torch.export.export(tiny().eval(), (torch.randn(2, 3, 8, 8),))


@pytest.fixture(scope="module")
def pt2(exported, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "tiny.pt2"
    torch.export.save(exported, path)
    return path


@pytest.fixture(scope="module")
def fused_pt2(exported, tmp_path_factory):
    path = tmp_path_factory.mktemp("fused") / "fused.pt2"
    torch.export.save(exported, path, extra_files={IN_ARCHIVE: report().to_json()})
    return path


def test_an_exported_model_computes_the_same_and_keeps_its_modules(exported, pt2):
    x = torch.randn(2, 3, 8, 8)
    model = load_model(str(pt2))
    torch.testing.assert_close(model(x), exported.module()(x))
    assert dict(model.named_modules()).keys() >= {"0", "1", "5"} and not model.training


def test_a_report_comes_out_of_a_saved_model(fused_pt2, pt2):
    assert saved_report(fused_pt2) == report()
    with pytest.raises(SourceError, match="was not written by gpukern fuse"):
        saved_report(pt2)
    with pytest.raises(SourceError, match="is fused already: gpukern explain"):
        load_model(str(fused_pt2))


def test_a_saved_model_with_another_report(exported, tmp_path):
    path = tmp_path / "fused.pt2"
    torch.export.save(exported, path, extra_files={IN_ARCHIVE: "{}"})
    with pytest.raises(SourceError, match="report that cannot be read: not a 'gpukern fusion report"):
        saved_report(path)


def damaged(path, folder, how):
    """A copy of ``path``: cut off, other bytes in the middle, or something else altogether."""
    raw = bytearray(path.read_bytes())
    if how == "cut":
        raw = raw[: len(raw) * 2 // 3]
    elif how == "flipped":
        at = max(range(0, len(raw) - 64, 64), key=lambda start: len(set(raw[start : start + 64])))
        raw[at : at + 8] = bytes(255 - byte for byte in raw[at : at + 8])
    else:
        raw = b"" if how == "empty" else b"<html>404 not found</html>"
    copy = folder / path.name
    copy.write_bytes(raw)
    return copy


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "foreign"])
def test_damaged_models_are_refused(pt2, tmp_path, how):
    path = damaged(pt2, tmp_path, how)
    for read in (saved_report, load_model):
        with pytest.raises(SourceError, match=str(path)):
            read(str(path))


# ---- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {"model_state_dict": state}},
        lambda state: {f"module.{name}": value for name, value in state.items()},
    ],
    ids=["plain", "state_dict", "nested", "data parallel"],
)
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_weights_of_torch_save(state, tmp_path, wrap, suffix):
    path = tmp_path / f"weights{suffix}"
    torch.save(wrap(state), path)
    assert same(load_model(TINY, path), state)


def test_weights_of_an_old_torch_save(state, tmp_path):
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(load_model(TINY, tmp_path / "old.pth"), state)


def test_a_checkpoint_of_the_training_program(tmp_path):
    trained = LeNet5()
    checkpoint.save(tmp_path / "checkpoint.pt", {"model": trained.state_dict(), "epoch": 12, "losses": torch.zeros(3)})
    assert same(load_model("models.lenet:LeNet5", tmp_path / "checkpoint.pt"), trained.state_dict())


@pytest.mark.parametrize("batch_norm", [False, True])
def test_that_checkpoint_is_a_model_itself(tmp_path, batch_norm):
    trained, path = LeNet5(batch_norm=batch_norm), tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"config": {"batch_norm": batch_norm}, "model": trained.state_dict()})
    made = load_model(str(path))
    assert same(made, trained.state_dict()) and not made.training
    other = LeNet5(batch_norm=batch_norm).state_dict()
    torch.save(other, tmp_path / "w.pth")
    assert same(load_model(str(path), tmp_path / "w.pth"), other)


def test_other_weights_are_no_model(state, tmp_path):
    torch.save(state, tmp_path / "w.pth")
    torch.save({"format": "os:abort", "model": state}, tmp_path / "foreign.pth")
    for name in ("w.pth", "foreign.pth"):
        with pytest.raises(SourceError, match=f"name the model, as in package.module:factory --weights .*{name}"):
            load_model(str(tmp_path / name))


def test_a_checkpoint_that_is_not_whole(tmp_path):
    checkpoint.save(tmp_path / "checkpoint.pt", {"config": {}})
    with pytest.raises(SourceError, match="fails: KeyError"):
        load_model(str(tmp_path / "checkpoint.pt"))
    cut = (tmp_path / "checkpoint.pt").read_bytes()[:-40]
    (tmp_path / "checkpoint.pt").write_bytes(cut)
    with pytest.raises(SourceError, match="cannot be loaded as weights"):
        load_model(str(tmp_path / "checkpoint.pt"))


def test_safetensors(state, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "weights.safetensors"
    safetensors.save_file(state, path)
    assert same(load_model(TINY, path), state)
    for how in ("cut", "empty", "foreign"):
        with pytest.raises(SourceError, match=r"is no \.safetensors file, or is cut off"):
            load_weights(damaged(path, tmp_path, how))


def test_safetensors_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(SourceError, match="pip install safetensors"):
        load_weights(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "foreign"])
def test_damaged_weights_are_refused(state, tmp_path, how):
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(SourceError, match=r"weights\.pth"):
        load_weights(damaged(tmp_path / "weights.pth", tmp_path, how))


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def test_nothing_is_run_that_a_file_asks_for(tmp_path):
    torch.save({"0.weight": Bomb()}, tmp_path / "weights.pth")
    with pytest.raises(SourceError, match="cannot be loaded as weights"):
        load_weights(tmp_path / "weights.pth")


@pytest.mark.parametrize("held", [[1, 2], {}, {"epoch": 3}, torch.zeros(3), {"model": {"epoch": 3}}], ids=str)
def test_files_without_weights(tmp_path, held):
    torch.save(held, tmp_path / "weights.pth")
    with pytest.raises(SourceError, match="holds no state_dict"):
        load_weights(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: state.pop("5.bias"), "missing: 5.bias"),
        (lambda state: state.update(head=torch.zeros(2)), "unknown: head"),
        (lambda state: state.update({"5.weight": torch.zeros(7, 8)}), "5.weight is 7×8, the model's 5×8"),
        (lambda state: [state.pop(name) for name in list(state)[1:]], "missing: .* and 2 more"),
    ],
)
def test_weights_of_another_model(state, tmp_path, change, complaint):
    other = dict(state)
    change(other)
    torch.save(other, tmp_path / "weights.pth")
    with pytest.raises(SourceError, match=f"weights.pth does not fit the model.*{complaint}"):
        load_model(TINY, tmp_path / "weights.pth")


def test_files_that_are_not_there_or_are_of_no_known_kind(tmp_path):
    with pytest.raises(SourceError, match="there is no file"):
        load_weights(tmp_path / "weights.pth")
    (tmp_path / "weights.h5").write_bytes(b"")
    with pytest.raises(SourceError, match=r"weights come from \.safetensors"):
        load_weights(tmp_path / "weights.h5")


# ---- inputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["32,3,224,224", "32x3x224x224", " 32, 3 ,224×224 ", "32X3X224X224"])
def test_shapes(words):
    assert shape_called(words) == (32, 3, 224, 224)


@pytest.mark.parametrize("words", ["", "x", "1,,2", "0,3", "-1,3", "1.5,3", "1,3,", "9" * 12, "１,3"])
def test_no_shapes(words):
    with pytest.raises(SourceError, match="is no shape"):
        shape_called(words)


def test_every_error_is_a_value_error():
    assert issubclass(sources.SourceError, ValueError)
