"""Every network of this folder by name: how it is made for images and classes of one's own."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import gpukern
from gpukern.runtime.mode import Mode, mode_of
from models.alexnet import AlexNet
from models.ciresan import DenseCiresanN4
from models.convnext import ConvNeXtTiny
from models.efficientnet import EfficientNetB0
from models.efficientnet_lite import EfficientNetLite0
from models.lenet import LeNet5
from models.mobilenet import MobileNetV2
from models.resnet import cifar_resnet, resnet18, resnet34, resnet50, resnet101, resnet152
from models.unet import UNet
from models.vgg import DEPTHS, VGG

_IMAGENET, _CIFAR = (3, 224, 224), (3, 32, 32)
#: Mean and deviation of pixels 0 to 255 with which published weights were trained: ImageNet's, and EfficientNet-Lite's.
Pixels = tuple[tuple[float, ...], tuple[float, ...]]
_IMAGENET_PIXELS: Pixels = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
_LITE_PIXELS: Pixels = ((127.0,) * 3, (128.0,) * 3)
#: Images of at most this many pixels a side are small: the first layers then must not shrink them.
SMALL = 64


@dataclass(frozen=True)
class Architecture:
    """One network: what makes it, and one image [C, H, W] as published."""

    name: str
    title: str
    maker: Callable[..., nn.Module]
    input_size: tuple[int, int, int] = _IMAGENET
    pixels: Pixels | None = _IMAGENET_PIXELS

    @property
    def options(self) -> set[str]:
        """What :meth:`build` takes beside the number of classes."""
        parameters = set(inspect.signature(self.maker).parameters)
        if "options" in parameters:  # ResNet's, handed on
            parameters |= {"channels", "small_images", "dropout"}
        return parameters - {"options", "classes"}

    def build(self, classes: int, image_size: tuple[int, int, int], **options: Any) -> nn.Module:
        """It for images [C, H, W], with new random weights, on torch's layers; LeNet-5 on gpukern's.

        Options that are None are the network's own defaults. Small images get the small-image form where there is one.
        ValueError for what the network does not take.
        """
        given = {name: value for name, value in options.items() if value is not None}
        channels, height, width = image_size
        if "channels" in self.options:
            given["channels"] = channels
        elif channels != self.input_size[0]:
            wanted = f"{self.input_size[0]} channel{'s' * (self.input_size[0] > 1)}"
            raise ValueError(f"{self.title} takes images of {wanted}, these have {channels}; resnet18 takes any number")
        if self.name == "lenet" and (height, width) != self.input_size[1:]:
            raise ValueError(f"{self.title} takes images of 28 × 28, these are {height} × {width}")
        if "small_images" in self.options and "small_images" not in given:
            given["small_images"] = max(height, width) <= SMALL
        if unknown := sorted(given.keys() - self.options):
            raise ValueError(f"{self.title} has no {' and no '.join(unknown)}")
        return self.maker(classes=classes, **given)


def _vggs() -> list[Architecture]:
    return [
        Architecture(f"vgg{depth}{'_bn' * norm}", f"VGG-{depth}{' with batch norm' * norm}", maker)
        for depth in DEPTHS
        for norm, maker in ((False, partial(VGG, depth)), (True, partial(VGG, depth, batch_norm=True)))
    ]


def _cifar_resnets() -> list[Architecture]:
    return [
        Architecture(f"resnet{depth}", f"ResNet-{depth}", partial(cifar_resnet, depth), _CIFAR, None)
        for depth in (8, 14, 20, 32, 44, 56, 110)
    ]


ARCHITECTURES: dict[str, Architecture] = {
    each.name: each
    for each in (
        Architecture("lenet", "LeNet-5", LeNet5, LeNet5.INPUT_SIZE, None),
        Architecture("alexnet", "AlexNet", AlexNet),
        *_vggs(),
        Architecture("resnet18", "ResNet-18", resnet18),
        Architecture("resnet34", "ResNet-34", resnet34),
        Architecture("resnet50", "ResNet-50", resnet50),
        Architecture("resnet101", "ResNet-101", resnet101),
        Architecture("resnet152", "ResNet-152", resnet152),
        *_cifar_resnets(),
        Architecture("mobilenet_v2", "MobileNet-V2", MobileNetV2),
        Architecture("efficientnet_b0", "EfficientNet-B0", EfficientNetB0),
        Architecture("efficientnet_lite0", "EfficientNet-Lite0", EfficientNetLite0, pixels=_LITE_PIXELS),
        Architecture("convnext_tiny", "ConvNeXt-T", ConvNeXtTiny),
        Architecture("unet", "U-Net", UNet, (3, 256, 256), None),
        Architecture("ciresan_dense", "Ciresan's N4, dense", DenseCiresanN4, (1, 606, 606), None),
    )
}
#: Those that put an image into a class.
CLASSIFIERS = tuple(name for name in ARCHITECTURES if name not in ("unet", "ciresan_dense"))


def with_kernels(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` itself on gpukern's layers, where its kernels run.

    In reference mode torch's own layers compute the same; the reference of a batch norm, which is made of many
    operations to be read, would take as long as the convolutions.
    """
    reference = mode_of(torch.empty(0, device=device)) is Mode.REFERENCE
    return model if reference else gpukern.convert(model, inplace=True)


def architecture(name: str) -> Architecture:
    """The one of this name or title, whatever its case and punctuation: "vgg16", "VGG-16", "vgg_16".

    ValueError, listing the names, for any other.
    """
    for known in ARCHITECTURES.values():
        if letters(name) in (letters(known.name), letters(known.title)):
            return known
    raise ValueError(f"unknown network {name!r}: expected one of {', '.join(ARCHITECTURES)}")


def letters(name: str) -> str:
    """``name`` without case and punctuation."""
    return re.sub(r"[\W_]+", "", name.lower())
