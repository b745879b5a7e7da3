"""Networks that tell of every pixel whether it lies inside a cell, and how each is run over an image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

import gpukern
from models.ciresan import CiresanN4
from models.registry import with_kernels
from models.unet import UNet

if TYPE_CHECKING:
    from models.membranes.config import Config

#: Of the two outputs, which is the logit of what.
MEMBRANE, INSIDE = 0, 1


@dataclass(frozen=True)
class Kind:
    """``make(width, depth, dropout)``: the network. ``patches``: whether it looks at one patch for each pixel."""

    title: str
    make: Callable[[int, int, float], nn.Module]
    patches: bool = False


NETWORKS: dict[str, Kind] = {
    "unet": Kind("U-Net", lambda width, depth, dropout: UNet(1, 2, width, depth, dropout=dropout)),
    "unet-valid": Kind(
        "U-Net of valid convolutions",
        lambda width, depth, dropout: UNet(1, 2, width, depth, padding="valid", dropout=dropout),
    ),
    "ciresan": Kind("Ciresan's N4", lambda width, depth, dropout: CiresanN4(width=width, dropout=dropout), True),
}


class Network:
    """``model``, which learns, and ``dense``, which computes it for all pixels of an image by the same parameters.

    ``dense`` maps [N, 1, H + 2·context, W + 2·context] to logits [N, 2, H, W], for H and W as :meth:`fitting` gives
    them. To an image it belongs with mirrored borders: ``margin`` are the pixels on which an output depends at each
    side, of which padded convolutions make up those that are not there (``context`` 0).
    """

    def __init__(self, config: Config, device: torch.device, model: nn.Module | None = None) -> None:
        kind = NETWORKS[config.network]
        if model is None:
            made = with_kernels(kind.make(config.width, config.depth, config.dropout).to(device), device)
            made = made.double() if config.precision == "fp64" else made
            model = made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = model
        self.dense: nn.Module = gpukern.dense(model, CiresanN4.PATCH) if kind.patches else model
        #: Whether the model looks at one patch for each pixel.
        self.patches = kind.patches
        self.context = CiresanN4.MARGIN if kind.patches else _unet(model).margin
        self.multiple = 1 if kind.patches else _unet(model).multiple
        # Of padded convolutions: what zeros at the border could change, in whole steps of the pools.
        self.margin = self.context or 6 * self.multiple

    def fitting(self, size: int) -> int:
        """The smallest side of an output that is at least ``size``."""
        return size if self.patches else _unet(self.model).fitting(size)

    @property
    def parameter(self) -> torch.Tensor:
        """One of them, for its device and dtype."""
        return next(self.model.parameters())

    def train(self, mode: bool = True) -> None:
        """Put both in training or evaluation mode: they share parameters, not modes."""
        self.model.train(mode)
        self.dense.train(mode)


def _unet(model: nn.Module) -> UNet:
    assert isinstance(model, UNet)
    return model


def full(logits: torch.Tensor) -> torch.Tensor:
    """Of mixed precision as float32."""
    return logits if logits.dtype == torch.float64 else logits.float()
