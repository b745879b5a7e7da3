"""Observation of the folded network: the magnitudes that the layers of each domain write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from gpukern.fusion.quantization.domains import Domains
from gpukern.fusion.quantization.histogram import Histogram
from gpukern.fusion.quantization.network import Network, Run


class Observer:
    """Counts the magnitudes of every domain that can be stored in eight bits; ``of``: by the name of its values."""

    def __init__(self, network: Network, found: Domains) -> None:
        self.of: dict[str, Histogram] = {}
        self._writers: dict[str, Histogram] = {}
        for domain in found.every:
            if not domain.why_not:
                histogram = Histogram()
                self.of |= dict.fromkeys(domain.values, histogram)
                self._writers |= dict.fromkeys(domain.writers, histogram)
        self._run = Run(network, see=self._see)

    def observe(self, leaves: Sequence[Any]) -> None:
        """Run a batch. ValueError where a value is not finite, from which no range can be taken."""
        self._run.outputs(leaves)

    def _see(self, node: Node, result: Any, args: tuple) -> None:
        histogram = self._writers.get(node.name)
        if histogram is None:
            return
        if not torch.isfinite(result).all():
            raise ValueError(f"the model computes NaN or infinity for a batch of calibrate, in {node.name}")
        histogram.add(result)
