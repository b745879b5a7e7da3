"""Random crops of sections with their surroundings, deformed, turned and lit differently every time."""

from __future__ import annotations

import numpy as np
import torch

from models.membranes.augment import Augmentation
from models.membranes.config import Config
from models.membranes.networks import NETWORKS, Network
from models.membranes.normalization import Normalization
from models.membranes.objective import Batch
from models.membranes.volumes import Volume
from models.membranes.weights import border_weights


class Crops:
    """``crops(step)``: the :class:`Batch` of a step, on the network's device, the same whenever it is asked for.

    Sections are mirrored at their borders by what the network sees around a crop, so that pixels there are learned
    too. ValueError for a crop of a size that the network does not take, or larger than the sections.
    """

    def __init__(self, config: Config, volume: Volume, normalization: Normalization, network: Network) -> None:
        assert volume.labels is not None
        if (fitting := network.fitting(config.crop)) != config.crop:
            title = NETWORKS[config.network].title
            raise ValueError(f"{title} takes no crops of {config.crop} pixels: the next larger one has {fitting}")
        if config.crop > min(volume.images.shape[1:]):
            size = " × ".join(map(str, volume.images.shape[1:]))
            raise ValueError(f"sections of {size} hold no crop of {config.crop} pixels")
        self.count, self.context, self.normalization = config.batch_size, network.context, normalization
        weights = None if network.patches else border_weights(volume.labels, config.w0, config.sigma)
        self.images, self.labels = self._placed(volume.normalized(), network), self._placed(volume.labels, network)
        self.weights = None if weights is None else self._placed(weights, network)
        self.augment = Augmentation(config.crop + 2 * self.context, elastic=config.elastic, seed=config.seed)

    def _placed(self, stack: np.ndarray, network: Network) -> torch.Tensor:
        """[sections, 1, H + 2·context, W + 2·context], floats in the network's dtype, on its device."""
        sides = (self.context, self.context)
        tensor = torch.from_numpy(np.pad(stack, ((0, 0), sides, sides), mode="reflect"))[:, None]
        return tensor.to(network.parameter.device, network.parameter.dtype if tensor.is_floating_point() else None)

    def __call__(self, step: int) -> Batch:
        self.augment.step = step
        chosen = np.random.default_rng([self.augment.seed, step, 1]).integers(0, len(self.images), self.count)
        index = torch.from_numpy(chosen).to(self.images.device)
        weights = None if self.weights is None else self.weights[index]
        images, labels, weights = self.augment(self.images[index], self.labels[index], weights)
        assert labels is not None
        images = self.normalization(images).contiguous(memory_format=torch.channels_last)
        labels = self._middle(labels).long()
        return Batch(images, labels, torch.ones_like(labels) if weights is None else self._middle(weights))

    def _middle(self, batch: torch.Tensor) -> torch.Tensor:
        """Without the surroundings, [N, H, W]."""
        inner = slice(self.context, batch.shape[-1] - self.context)
        return batch[:, 0, inner, inner]
