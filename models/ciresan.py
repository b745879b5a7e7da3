"""The network that looks at a patch and tells what its middle pixel is.

Ciresan, Giusti, Gambardella and Schmidhuber, "Deep neural networks segment neuronal membranes in electron microscopy
images", NIPS 2012: the network N4, which won the ISBI 2012 challenge.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from models.blocks import initialize


class CiresanN4(nn.Sequential):
    """[N, channels, 95, 95] → logits [N, classes] of the middle pixel, row and column 47.

    ==================================  ============  ===============
    layer                               output size   weight size
    ==================================  ============  ===============
    Conv (C_out=48, K=4, S=1), ReLU     48 × 92 × 92  48 × 1 × 4 × 4
    MaxPool(K=2, S=2)                   48 × 46 × 46
    Conv (C_out=48, K=5, S=1), ReLU     48 × 42 × 42  48 × 48 × 5 × 5
    MaxPool(K=2, S=2)                   48 × 21 × 21
    Conv (C_out=48, K=4, S=1), ReLU     48 × 18 × 18  48 × 48 × 4 × 4
    MaxPool(K=2, S=2)                   48 × 9 × 9
    Conv (C_out=48, K=4, S=1), ReLU     48 × 6 × 6    48 × 48 × 4 × 4
    MaxPool(K=2, S=2)                   48 × 3 × 3
    Flatten                             432
    Linear (432 -> 200), ReLU           200           432 × 200
    Linear (200 -> 2)                   2             200 × 2
    ==================================  ============  ===============

    219,290 parameters, 121.5 M multiply-adds. :func:`gpukern.dense` makes of it a network that gives the same for every
    pixel of an image. No layer pads: what a patch's output is depends on nothing outside of it, nor on its border.

    Parameters
    ----------
    width, hidden:
        maps of each convolution, and units of the hidden layer.
    dropout:
        probability of a zero after the hidden layer.
    """

    #: Side of a patch, and what lies above and left of its middle pixel.
    PATCH = 95
    MARGIN = PATCH // 2

    def __init__(
        self,
        classes: int = 2,
        channels: int = 1,
        width: int = 48,
        hidden: int = 200,
        dropout: float = 0.0,
    ) -> None:
        layers: dict[str, nn.Module] = OrderedDict()
        for number, (inputs, kernel) in enumerate(((channels, 4), (width, 5), (width, 4), (width, 4)), start=1):
            layers[f"conv{number}"] = nn.Conv2d(inputs, width, kernel)
            layers[f"relu{number}"] = nn.ReLU()
            layers[f"pool{number}"] = nn.MaxPool2d(2)
        layers |= {"flatten": nn.Flatten(), "fc1": nn.Linear(width * 3 * 3, hidden), "relu5": nn.ReLU()}
        if dropout:
            layers["dropout"] = nn.Dropout(dropout)
        layers["fc2"] = last = nn.Linear(hidden, classes)
        super().__init__(OrderedDict(layers))
        initialize(self, mode="fan_in", linear=lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"))
        nn.init.kaiming_normal_(last.weight, nonlinearity="linear")


class DenseCiresanN4(nn.Sequential):
    """[N, channels, H, W] → logits [N, classes, H − 94, W − 94]: what :class:`CiresanN4` says of every patch.

    Written out on torch's layers, as the peer of what :func:`gpukern.dense` makes: pools have stride 1, and what comes
    after the n-th of them is dilated by 2ⁿ. 218,896 multiply-adds a pixel, where patches take 121.5 M.
    """

    def __init__(self, classes: int = 2, channels: int = 1, width: int = 48, hidden: int = 200) -> None:
        layers: dict[str, nn.Module] = OrderedDict()
        for number, (inputs, kernel) in enumerate(((channels, 4), (width, 5), (width, 4), (width, 4))):
            dilation = 2**number
            layers[f"conv{number + 1}"] = nn.Conv2d(inputs, width, kernel, dilation=dilation)
            layers[f"relu{number + 1}"] = nn.ReLU()
            layers[f"pool{number + 1}"] = nn.MaxPool2d(2, stride=1, dilation=dilation)
        layers |= {"fc1": nn.Conv2d(width, hidden, 3, dilation=16), "relu5": nn.ReLU()}
        layers["fc2"] = nn.Conv2d(hidden, classes, 1)
        super().__init__(OrderedDict(layers))
        initialize(self, mode="fan_in")
