"""The probability that a pixel lies inside a cell, for all pixels of all sections."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

import gpukern
from models.config import PRECISIONS
from models.membranes.networks import INSIDE, Network, full
from models.membranes.normalization import Normalization

#: Of a tile's output, where a section is larger and no size is asked for: what a GPU, or a CPU's memory, likes.
TILE = 512
#: Over how many of the eight mirror images and rotations by right angles a probability can be averaged.
AVERAGES = (1, 8)
DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Options:
    """``tile``: side of a tile's output (None: the section's, up to :data:`TILE`); ``average``: one of
    :data:`AVERAGES`; ``fuse``: by :func:`gpukern.fuse`; ``dtype``: one of :data:`DTYPES`.
    """

    tile: int | None = None
    average: int = 1
    fuse: bool = False
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        if self.tile is not None and self.tile < 1:
            raise ValueError(f"a tile must have one pixel at least, got {self.tile}")
        if self.average not in AVERAGES:
            raise ValueError(f"expected an average over {' or '.join(map(str, AVERAGES))} views, got {self.average}")
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}, expected one of {', '.join(DTYPES)}")


class Predictor:
    """``predictor(section)``: floats [H, W] from 0 to 1 → the probabilities of the inside of a cell, of their dtype.

    Sections have ``size``. Tiles overlap by what the network sees around a pixel, and a section is mirrored at its
    border: the result is the same for all sizes of tiles, to rounding. ``advance`` is called after every tile.
    """

    def __init__(
        self,
        network: Network,
        normalization: Normalization,
        size: tuple[int, int],
        options: Options | None = None,
        advance: Callable[[], object] | None = None,
    ) -> None:
        self.network, self.normalization, self.options = network, normalization, options or Options()
        self.size, self.advance = size, advance
        self.tile = network.fitting(min(self.options.tile or TILE, max(size)))
        self._dtype = PRECISIONS[self.options.dtype]
        self._compute: Callable[[torch.Tensor], torch.Tensor] = self._fused() if self.options.fuse else network.dense

    @property
    def side(self) -> int:
        """Of what the network is given for a tile."""
        return self.tile + 2 * self.network.margin

    @property
    def tiles(self) -> int:
        """For a section, in all views of it."""
        return self.options.average * math.prod(-(-length // self.tile) for length in self.size)

    def _fused(self) -> Callable[[torch.Tensor], torch.Tensor]:
        example = self.network.parameter.new_zeros(1, 1, self.side, self.side)
        return gpukern.fuse(self.network.dense, (example,), dtype=self._dtype)

    def __call__(self, section: np.ndarray) -> np.ndarray:
        total = np.zeros(section.shape, np.float64)
        for turns, mirrored in _views(self.options.average):
            seen = np.rot90(section, turns)
            seen = np.ascontiguousarray(seen[:, ::-1] if mirrored else seen)
            found = self._tiles(seen)
            total += np.rot90(found[:, ::-1] if mirrored else found, -turns)
        return (total / self.options.average).astype(section.dtype)

    def _tiles(self, section: np.ndarray) -> np.ndarray:
        network = self.network
        return gpukern.predict_tiles(
            self._logits,
            section[None],
            tile=self.tile,
            margin=network.margin,
            multiple=network.multiple,
            device=network.parameter.device,
            dtype=network.parameter.dtype,
            before=self.normalization,
            after=self._inside,
        )[0]

    def _logits(self, tiles: torch.Tensor) -> torch.Tensor:
        tiles = tiles.contiguous(memory_format=torch.channels_last)
        if self.options.fuse:
            return self._compute(tiles)
        with torch.autocast(tiles.device.type, self._dtype, enabled=self._dtype is not None):
            return self._compute(tiles)

    def _inside(self, logits: torch.Tensor) -> torch.Tensor:
        if self.advance:
            self.advance()
        return full(logits).softmax(1)[:, INSIDE : INSIDE + 1]


def _views(average: int) -> list[tuple[int, bool]]:
    """Quarter turns, and whether mirrored after them."""
    return [(turns, mirrored) for mirrored in (False, True) for turns in range(4)][:average]
