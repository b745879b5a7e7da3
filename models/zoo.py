"""The networks of the benchmark by name, on torch's own layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from models.registry import ARCHITECTURES, letters


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


def _network(name: str, **options: Any) -> Network:
    known = ARCHITECTURES[name]
    return Network(name, known.title, partial(known.maker, **options), known.input_size)


#: By their names.
NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        _network("lenet", layers=nn),
        _network("resnet18"),
        _network("resnet50"),
        _network("vgg16", dropout=0.0),
        _network("mobilenet_v2", dropout=0.0),
        _network("efficientnet_b0", dropout=0.0, stochastic_depth=0.0),
        _network("efficientnet_lite0", dropout=0.0, stochastic_depth=0.0),
        # At the published 1e-6 the output would hardly depend on the blocks, and a comparison would not see them.
        _network("convnext_tiny", stochastic_depth=0.0, layer_scale=1.0),
        _network("unet"),
        _network("ciresan_dense"),
    )
}


def network(name: str) -> Network:
    """The network of this name or title, whatever its case and punctuation: "vgg16", "VGG-16", "vgg_16".

    ValueError, listing the names, for any other.
    """
    for known in NETWORKS.values():
        if letters(name) in (letters(known.name), letters(known.title)):
            return known
    raise ValueError(f"unknown network {name!r}: expected one of {', '.join(NETWORKS)}")
