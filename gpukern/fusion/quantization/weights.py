"""A layer's weight in eight bits."""

from __future__ import annotations

import torch

from gpukern.fusion.quantization.formats import FP8, Format, along_channels, weight_scales
from gpukern.fusion.quantization.network import Layer


def eight_bit_weight(layer: Layer, format: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight in ``format``, rounded once from its exact value, and its fp64 scales [K]."""
    scales = weight_scales(layer.weight, layer.dim, layer.groups, format)
    scaled = layer.weight / along_channels(scales, layer.weight, layer.dim, layer.groups)
    scaled = scaled.clamp(-format.largest, format.largest)
    return (scaled if format is FP8 else scaled.round()).to(format.dtype), scales


def seen_weight(layer: Layer, format: Format) -> torch.Tensor:
    """The weight as it is after it was stored, in fp64."""
    weight, scales = eight_bit_weight(layer, format)
    return weight.double() * along_channels(scales, layer.weight, layer.dim, layer.groups)
