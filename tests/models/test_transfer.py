"""Weights of elsewhere: which names fit, which head is new, what stays frozen, features computed once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gpukern.fusion.errors import WeightsError
from models import pretrained, transfer
from models.data import Samples
from models.efficientnet_lite import EfficientNetLite0, SamePad
from models.evaluation import accuracy
from models.freezing import freeze, groups, hold_batch_norms, thaw
from models.resnet import cifar_resnet

pytestmark = pytest.mark.usefixtures("reference_mode")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for so little data more only cost time
    yield
    torch.set_num_threads(threads)


def small(classes=10):
    return cifar_resnet(8, classes, width=4)


def assert_same(model, other, but=()):
    weights = other.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]) != (name in but), name


def wrapped(state):
    return {"epoch": 3, "optimizer": {"param_groups": []}, "state_dict": {f"module.{n}": t for n, t in state.items()}}


def save(path, state, kind):
    if kind == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(dict(state), path)
    else:
        torch.save(wrapped(state) if kind == "wrapped" else dict(state), path)
    return path


@pytest.mark.parametrize("kind", ["plain", "wrapped", "safetensors"])
def test_weights_of_every_file(tmp_path, kind):
    theirs, ours = small(), small()
    path = save(tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt"), theirs.state_dict(), kind)
    loaded = pretrained.load(ours, path)
    assert_same(ours, theirs)
    assert (loaded.copied, loaded.head, loaded.by_order) == (len(theirs.state_dict()), (), False)


def test_a_head_for_other_classes_stays_new_and_is_told(tmp_path):
    theirs, ours = small(10), small(3)
    before = ours.fc.weight.clone()
    loaded = pretrained.load(ours, save(tmp_path / "w.pt", theirs.state_dict(), "plain"))
    assert torch.equal(ours.fc.weight, before)
    assert torch.equal(ours.layer3[0].conv1.weight, theirs.layer3[0].conv1.weight)
    assert loaded.head == (("fc.weight", (10, 16), (3, 16)), ("fc.bias", (10,), (3,)))
    assert "fc.weight is new: [10, 16] in the weights, [3, 16] here" in str(loaded)


@pytest.mark.parametrize("counters", [True, False])
def test_other_names_are_matched_by_order(tmp_path, counters):
    theirs, ours = small(), small()
    state = {f"_blocks.{name.replace('.', '_', name.count('.') - 1)}": t for name, t in theirs.state_dict().items()}
    state = {name: t for name, t in state.items() if counters or "num_batches" not in name}
    loaded = pretrained.load(ours, save(tmp_path / "w.pt", state, "plain"))
    assert loaded.by_order and "matched by their order" in str(loaded)
    assert_same(ours, theirs)


def test_what_does_not_fit_is_told_and_changes_nothing(tmp_path):
    ours = small()
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    wide = {name: torch.ones(9) for name in before}
    for state, problem in (
        (cifar_resnet(8, width=8).state_dict(), r"conv1.weight is \[8, 3, 3, 3\], not \[4, 3, 3, 3\]"),
        ({"a": torch.ones(2)}, "it holds 1 tensors of 56 wanted, and no conv1.weight"),
        (wide, "does not fit"),
    ):
        with pytest.raises(WeightsError, match=problem):
            pretrained.load(ours, save(tmp_path / "w.pt", state, "plain"))
    (tmp_path / "w.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(WeightsError, match=r"w\.pt"):
        pretrained.load(ours, tmp_path / "w.pt")
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="no state_dict"):
        pretrained.load(ours, tmp_path / "w.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def test_heads_are_replaced():
    model = EfficientNetLite0()
    assert pretrained.head_of(model) == "classifier.1"
    head = pretrained.replace_head(model, 7)
    assert model.classifier[1] is head and head.weight.shape == (7, 1280)
    with pytest.raises(ValueError, match="no linear layer"):
        pretrained.head_of(nn.Conv2d(1, 1, 1))


def test_freezing_groups_and_thawing():
    model = small()
    frozen = freeze(model, ["conv1", "bn1", "layer1.*"])
    assert set(frozen) == {n for n, _ in model.named_parameters() if n.startswith(("conv1", "bn1", "layer1"))}
    hold_batch_norms(model.train())
    assert not model.bn1.training and not model.layer1[0].bn2.training and model.layer2[0].bn1.training
    first, rest = groups(model, 0.1, [("fc", 10.0)])
    assert first["lr"] == 1.0 and [p.shape for p in first["params"]] == [(10, 16), (10,)]
    assert len(first["params"]) + len(rest["params"]) == len(list(model.parameters()))
    thaw(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_features_are_those_the_head_would_get_and_a_head_learns_on_them():
    model = small().train()
    images = torch.randn(23, 3, 16, 16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = transfer.features(model, images, nn.Identity(), batch_size=7)
    assert model.training and model.bn1.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(model.fc(found), model.eval()(images))
    x, labels = torch.randn(23, 64), torch.arange(23) % 10
    assert accuracy(transfer.train_head(Samples(x, labels), 10), Samples(x, labels)) == 1


@pytest.mark.parametrize("size", [1, 5, 6, 7, 8])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (3, 3)])
def test_padding_is_tensorflows(size, kernel, stride):
    """⌈H/stride⌉ windows, and of an odd number of zeros the larger part behind."""
    x = torch.arange(1.0, size + 1).expand(1, 1, size, size)
    padded = SamePad(kernel, stride)(x)[0, 0, -1 if size == 1 else padded_row(size, kernel, stride)]
    assert (len(padded) - kernel) // stride + 1 == -(-size // stride)
    zeros = (padded == 0).nonzero().flatten().tolist()
    front = sum(index < len(padded) // 2 for index in zeros)
    assert 0 <= len(zeros) - 2 * front <= 1


def padded_row(size, kernel, stride):
    """One inside the image."""
    return max((-(-size // stride) - 1) * stride + kernel - size, 0) // 2


def test_lite0_computes_what_its_weights_were_trained_for():
    """The first features of the published port, which pads the same way, where it is installed."""
    port = pytest.importorskip("efficientnet_lite_pytorch")
    theirs = port.EfficientNet.from_name("efficientnet-lite0").eval()
    state = theirs.state_dict()
    ours = EfficientNetLite0().eval()
    tensors, by_order = pretrained._matched(ours.state_dict(), state)
    assert by_order
    ours.load_state_dict(tensors)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-4, atol=1e-4)
