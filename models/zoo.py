"""The networks of the benchmark by name, on torch's own layers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from models.convnext import ConvNeXtTiny
from models.efficientnet import EfficientNetB0
from models.efficientnet_lite import EfficientNetLite0
from models.lenet import LeNet5
from models.mobilenet import MobileNetV2
from models.resnet import resnet18, resnet50
from models.unet import UNet
from models.vgg import VGG16


@dataclass(frozen=True)
class Network:
    """One network of the benchmark."""

    name: str
    title: str
    #: Makes it with new random weights. It then computes without randomness also in training mode, so that two
    #: implementations can be compared: no dropout, no stochastic depth.
    make: Callable[[], nn.Module]
    #: One image, [C, H, W].
    input_size: tuple[int, int, int]


#: By their names.
NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        Network("lenet", "LeNet-5", partial(LeNet5, layers=nn), LeNet5.INPUT_SIZE),
        Network("resnet18", "ResNet-18", resnet18, (3, 224, 224)),
        Network("resnet50", "ResNet-50", resnet50, (3, 224, 224)),
        Network("vgg16", "VGG-16", partial(VGG16, dropout=0.0), (3, 224, 224)),
        Network("mobilenet_v2", "MobileNet-V2", partial(MobileNetV2, dropout=0.0), (3, 224, 224)),
        Network(
            "efficientnet_b0",
            "EfficientNet-B0",
            partial(EfficientNetB0, dropout=0.0, stochastic_depth=0.0),
            (3, 224, 224),
        ),
        Network("efficientnet_lite0", "EfficientNet-Lite0", partial(EfficientNetLite0, dropout=0.0), (3, 224, 224)),
        Network(
            "convnext_tiny",
            "ConvNeXt-T",
            # At the published 1e-6 the output would hardly depend on the blocks, and a comparison would not see them.
            partial(ConvNeXtTiny, stochastic_depth=0.0, layer_scale=1.0),
            (3, 224, 224),
        ),
        Network("unet", "U-Net", UNet, (3, 256, 256)),
    )
}


def network(name: str) -> Network:
    """The network of this name or title, whatever its case and punctuation: "vgg16", "VGG-16", "vgg_16".

    ValueError, listing the names, for any other.
    """
    for known in NETWORKS.values():
        if _letters(name) in (_letters(known.name), _letters(known.title)):
            return known
    raise ValueError(f"unknown network {name!r}: expected one of {', '.join(NETWORKS)}")


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.lower())
