"""The scheme of a model in eight bits: layers, their storage, and a scale for each domain that is stored so."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch

from gpukern.fusion.quantization.domains import Domains
from gpukern.fusion.quantization.formats import Format
from gpukern.fusion.quantization.network import Network
from gpukern.fusion.quantization.storage import Storage, store


@dataclass(frozen=True)
class Scheme:
    """``scales``: of each value that can be stored in eight bits, by the name of its node. ``estimators``: what found
    it. ``corrections``: what is added to the biases of layers in eight bits. ``equalized``: by how much the channels of
    a layer's output are divided in this network; ``rescaled``: layers
    whose weights are no longer the model's because of it."""

    network: Network
    domains: Domains
    format: Format
    scales: Mapping[str, float]
    estimators: Mapping[str, str]
    storage: Storage
    corrections: Mapping[str, torch.Tensor] = field(default_factory=dict)
    equalized: Mapping[str, torch.Tensor] = field(default_factory=dict)
    rescaled: frozenset[str] = frozenset()

    def with_eight(self, layers: Collection[str]) -> Scheme:
        """The same with other ``layers`` in eight bits."""
        return replace(self, storage=store(self.network, self.domains, layers))

    def scale_of(self, name: str) -> float | None:
        """The scale of a value that is stored in eight bits; None for one in 16."""
        return self.scales[name] if name in self.storage.stored else None

    def bias_of(self, name: str) -> torch.Tensor | None:
        """A layer's bias, with its correction if it is in eight bits."""
        bias, correction = self.network.layers[name].bias, self.corrections.get(name)
        if name not in self.storage.eight or correction is None:
            return bias
        return correction if bias is None else bias + correction
