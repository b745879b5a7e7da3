"""All networks by name: torchvision's, their forms for small images, what they take and refuse."""

from __future__ import annotations

import sys
import types
import zlib
from importlib.util import find_spec

import pytest
import torch
from torch import nn

import gpukern
from gpukern.runtime.mode import Mode, force_mode
from models.registry import ARCHITECTURES, CLASSIFIERS, architecture, with_kernels
from models.resnet import cifar_resnet
from models.vgg import VGG

pytestmark = pytest.mark.usefixtures("reference_mode")

#: Parameters, convolutions, and a checksum of the names and shapes that torchvision 0.28 has in the ``state_dict``.
TORCHVISIONS = {
    "alexnet": (61_100_840, 5, 0x3B0ABD09),
    "vgg11": (132_863_336, 8, 0x24CD9092),
    "vgg11_bn": (132_868_840, 8, 0xDDC6A36C),
    "vgg13": (133_047_848, 10, 0xA5080DC3),
    "vgg13_bn": (133_053_736, 10, 0x712B93F6),
    "vgg16": (138_357_544, 13, 0x5692D93F),
    "vgg16_bn": (138_365_992, 13, 0x9B082874),
    "vgg19": (143_667_240, 16, 0xBE8C670B),
    "vgg19_bn": (143_678_248, 16, 0xB28A3625),
    "resnet18": (11_689_512, 20, 0x14F37586),
    "resnet34": (21_797_672, 36, 0xDB228571),
    "resnet50": (25_557_032, 53, 0xB2132181),
    "resnet101": (44_549_160, 104, 0x36068F3B),
    "resnet152": (60_192_808, 155, 0x02CBE0FD),
    "mobilenet_v2": (3_504_872, 52, 0xFE31E3D0),
    "efficientnet_b0": (5_288_548, 81, 0xB0E9339A),
    "convnext_tiny": (28_589_128, 22, 0xB8433379),
}
#: Those that torchvision does not have.
OTHERS = {"lenet": 1_256_080, "efficientnet_lite0": 4_652_008, "resnet20": 272_474, "resnet110": 1_730_714}


def made(name, **options):
    """Without its memory and the time of drawing its weights."""
    with torch.device("meta"):
        return ARCHITECTURES[name].maker(**options)


def checksum(model):
    return zlib.crc32(repr([(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]).encode())


@pytest.mark.parametrize("name", TORCHVISIONS)
def test_networks_are_torchvisions(name):
    model = made(name)
    parameters, convolutions, names = TORCHVISIONS[name]
    assert gpukern.summary(model, ARCHITECTURES[name].input_size).parameters == parameters
    assert sum(isinstance(layer, nn.Conv2d) for layer in model.modules()) == convolutions
    assert checksum(model) == names


@pytest.mark.parametrize("name", OTHERS)
def test_summary_of_the_others(name):
    assert gpukern.summary(made(name), ARCHITECTURES[name].input_size).parameters == OTHERS[name]


@pytest.mark.slow
def test_logits_are_torchvisions_own():
    """Of one network of each file; the checksums above say the rest."""
    if find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    # One that was built for another PyTorch refuses to be imported for its operators, which no network here uses.
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("unused"))
    torchvision = pytest.importorskip("torchvision")
    for name in ("alexnet", "vgg11_bn", "resnet34", "resnet101"):
        theirs = torchvision.models.get_model(name, weights=None).eval()
        ours = ARCHITECTURES[name].maker().eval()
        ours.load_state_dict(theirs.state_dict())
        image = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(ours(image), theirs(image)), name


@pytest.mark.parametrize("name", sorted(set(CLASSIFIERS) - {"lenet"}))
def test_small_images(name):
    with torch.device("meta"):
        model = ARCHITECTURES[name].build(10, (3, 32, 32))
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 10)
    if "small_images" in ARCHITECTURES[name].options:
        last = [size for size in shapes(model) if len(size) == 4][-1]
        assert last[2] >= (4 if name.startswith("resnet") else 1), "the image is shrunk too soon"
        assert ARCHITECTURES[name].build.__self__.options >= {"channels", "width", "dropout"}


def shapes(model):
    """Of what every convolution gives."""
    found = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda layer, args, output: found.append(tuple(output.shape)))
    with torch.device("meta"):
        model(torch.empty(1, 3, 32, 32))
    return found


def test_options_reach_the_network():
    with torch.device("meta"):
        model = architecture("ResNet-18").build(7, (1, 28, 28), width=8, dropout=0.3)
    assert (model.conv1.in_channels, model.conv1.kernel_size, model.fc.out_features) == (1, (3, 3), 7)
    assert model.dropout.p == 0.3 and isinstance(model.maxpool, nn.Identity)
    with torch.device("meta"):
        assert isinstance(architecture("resnet18").build(7, (3, 96, 96)).maxpool, nn.MaxPool2d)
        assert [m.p for m in architecture("alexnet").build(7, (3, 32, 32), dropout=0.1).modules()
                if isinstance(m, nn.Dropout)] == [0.1, 0.1]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "size", "options", "problem"),
    [
        ("lenet", (1, 27, 28), {}, "28 × 28, these are 27 × 28"),
        ("lenet", (3, 28, 28), {}, "1 channel.*have 3"),
        ("mobilenet_v2", (1, 32, 32), {}, "3 channel.*have 1"),
        ("resnet18", (3, 32, 32), {"batch_norm": True}, "ResNet-18 has no batch_norm"),
        ("convnext_tiny", (3, 32, 32), {"dropout": 0.1, "width": 3}, "no dropout and no width"),
    ],
)
def test_what_a_network_does_not_take_is_told(name, size, options, problem):
    with pytest.raises(ValueError, match=problem):
        ARCHITECTURES[name].build(10, size, **options)


def test_unknown_names_and_depths():
    with pytest.raises(ValueError, match=r"unknown network 'resnet19'.*resnet18"):
        architecture("resnet19")
    with pytest.raises(ValueError, match="6n"):
        cifar_resnet(10)
    with pytest.raises(ValueError, match="11, 13, 16, 19, got 12"):
        VGG(12)


def test_new_weights_of_alexnet_keep_the_scale_of_the_signal():
    model = ARCHITECTURES["alexnet"].build(10, (3, 32, 32), width=16).eval()
    with torch.no_grad():
        assert 0.05 < model(torch.randn(8, 3, 32, 32)).std() < 5


def test_kernels_take_the_place_of_torchs_layers_where_they_run():
    device = torch.device("cpu")
    with force_mode(Mode.REFERENCE):
        assert type(with_kernels(cifar_resnet(8, width=4), device).conv1) is nn.Conv2d
    with force_mode(Mode.EMULATED):
        assert type(with_kernels(cifar_resnet(8, width=4), device).conv1) is gpukern.nn.Conv2d
