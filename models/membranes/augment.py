"""Other sections from those there are: elastic deformation, rotation, flips and intensities, labels moved alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from gpukern.runtime.arguments import as_pair


class Augmentation:
    """Random deformation, rotation, flip and intensity of images [N, 1, H, W] from 0 to 1, on their own device.

    Labels and weights are moved as their images are: images with bicubic interpolation, which blurs their noise the
    least, weights with bilinear, labels with none. What lies beyond an image is its mirror image.

    Parameters
    ----------
    size:
        height and width of the result, an int for both: a window at a random place, deformed and turned there, so that
        its corners show tissue and not mirror images while the section goes on. None for images as large as they are.
    elastic:
        standard deviation, in pixels, of the displacements at the nodes of a ``grid`` × ``grid`` that spans the result;
        between them they are interpolated bicubically. 10 and 3 × 3 as in the U-Net paper (Ronneberger et al. 2015),
        whose images had 512 × 512 pixels: smaller windows want less.
    rotation:
        by an angle from −``rotation`` to ``rotation`` degrees.
    flip:
        whether half of the images are mirrored; with rotations by any angle one axis is enough.
    gain, bias, gamma:
        (x^g − ½) · a + ½ + b, cut off at 0 and 1, with a from 1 − ``gain`` to 1 + ``gain``, b from −``bias`` to
        ``bias`` and g from exp(−``gamma``) to exp(``gamma``).
    seed:
        with ``step`` it tells everything that is random. The draws are made on the host: they are the same on each
        device.

    ``step`` is what was counted so far, one for each call; with the seed it is the ``state_dict``. Where nothing is to
    be moved, images are cropped, not interpolated. Raises ValueError for options; in a call ValueError for shapes that
    do not fit and images smaller than ``size``, TypeError for images that are not floats.
    """

    def __init__(
        self,
        size: int | Sequence[int] | None = None,
        *,
        elastic: float = 10.0,
        grid: int = 3,
        rotation: float = 180.0,
        flip: bool = True,
        gain: float = 0.1,
        bias: float = 0.1,
        gamma: float = 0.3,
        seed: int = 0,
    ) -> None:
        self.size = None if size is None else as_pair("size", size)
        self.elastic, self.grid, self.rotation, self.flip = elastic, grid, rotation, flip
        self.gain, self.bias, self.gamma, self.seed, self.step = gain, bias, gamma, seed, 0
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        for name in ("elastic", "rotation", "gain", "bias", "gamma"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if gain >= 1:
            raise ValueError(f"gain must be below 1, got {gain}")
        if grid < 2 or seed < 0:
            raise ValueError(f"grid must be at least 2 and seed at least 0, got {grid} and {seed}")

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seed, self.step = state["seed"], state["step"]

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor | None = None, weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return images [N, 1, \\*size], and labels and weights, of [N, H, W] or [N, 1, H, W], as they were given.

        Labels keep their dtype, bool or any other. Images of 16-bit floats are computed in float32.
        """
        size = self._check(images, labels, weights)
        random = np.random.default_rng([self.seed, self.step])
        self.step += 1
        draws = self._draw(random, len(images), images.shape[2:], size)
        exact = images.to(torch.promote_types(images.dtype, torch.float32))
        if self.elastic or self.rotation or self.flip:
            places = _places(size, *(torch.from_numpy(draw).to(exact.device, exact.dtype) for draw in draws))
            modes = (exact, "bicubic"), (labels, "nearest"), (weights, "bilinear")
            moved = [_sampled(each, places, mode) for each, mode in modes]
        else:
            moved = [_cropped(each, draws[0], size) for each in (exact, labels, weights)]
        assert moved[0] is not None
        return self._lit(moved[0], random).to(images.dtype), moved[1], moved[2]

    def _check(
        self, images: torch.Tensor, labels: torch.Tensor | None, weights: torch.Tensor | None
    ) -> tuple[int, int]:
        """The size of the result."""
        if images.dim() != 4 or images.shape[1] != 1:
            raise ValueError(f"expected images [N, 1, H, W], got {list(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"expected images of floats from 0 to 1, got {images.dtype}")
        count, _, height, width = images.shape
        for name, each in (("labels", labels), ("weights", weights)):
            if each is not None and each.shape not in ((count, height, width), images.shape):
                raise ValueError(f"expected {name} for images {list(images.shape)}, got {list(each.shape)}")
        if weights is not None and not weights.is_floating_point():
            raise TypeError(f"expected weights of floats, got {weights.dtype}")
        size = self.size or (height, width)
        if size[0] > height or size[1] > width:
            raise ValueError(f"images of {height} × {width} are smaller than {size[0]} × {size[1]}")
        return size

    def _draw(
        self, random: np.random.Generator, count: int, shape: Sequence[int], size: tuple[int, int]
    ) -> tuple[np.ndarray, ...]:
        """Upper left corners [N, 2], matrices [N, 2, 2] and displacements [N, 2, grid, grid], all (down, across)."""
        corners = np.stack([random.integers(0, shape[axis] - size[axis] + 1, count) for axis in (0, 1)], axis=1)
        angles = np.deg2rad(random.uniform(-self.rotation, self.rotation, count))
        mirrored = np.where(random.random(count) < 0.5, -1.0, 1.0) if self.flip else np.ones(count)
        cosine, sine = np.cos(angles), np.sin(angles)
        rows = np.stack([cosine, -sine * mirrored], axis=1), np.stack([sine, cosine * mirrored], axis=1)
        moves = self.elastic * random.standard_normal((count, 2, self.grid, self.grid))
        return corners, np.stack(rows, axis=1), moves

    def _lit(self, images: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
        """The images with other intensities."""
        spans = (self.gain, self.bias, self.gamma)
        drawn = [random.uniform(-span, span, (len(images), 1, 1, 1)) for span in spans]
        if not any(spans):
            return images
        gain, bias, gamma = (torch.from_numpy(draw).to(images.device, images.dtype) for draw in drawn)
        return ((images.clamp(0, 1) ** gamma.exp() - 0.5) * (1 + gain) + 0.5 + bias).clamp(0, 1)


def _places(size: tuple[int, int], corners: torch.Tensor, matrices: torch.Tensor, moves: torch.Tensor) -> torch.Tensor:
    """Where each pixel of the result comes from: [N, height, width, 2], (down, across) in pixels of the image."""
    middle = (torch.tensor(size, dtype=corners.dtype, device=corners.device) - 1) / 2
    lines = [torch.arange(length, dtype=corners.dtype, device=corners.device) for length in size]
    around = torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1) - middle
    turned = torch.einsum("nij,hwj->nhwi", matrices, around)
    field = F.interpolate(moves, size, mode="bicubic", align_corners=True)
    return turned + (corners + middle)[:, None, None] + field.permute(0, 2, 3, 1)


def _sampled(each: torch.Tensor | None, places: torch.Tensor, mode: str) -> torch.Tensor | None:
    """``each`` [N, H, W] or [N, 1, H, W] at the ``places``, mirrored at its edges; of its own dtype."""
    if each is None:
        return None
    if not each.is_floating_point() and each.element_size() > 2:
        places = places.double()  # float32 holds no numbers of cells above 2^24
    source = (each if each.dim() == 4 else each[:, None]).to(places.dtype)
    lengths = torch.tensor(source.shape[2:], dtype=places.dtype, device=places.device)
    # grid_sample's coordinates: from −1 to 1 between the middles of the outer pixels, across before down.
    coordinates = (2 * places / (lengths - 1).clamp(min=1) - 1).flip(-1)
    result: Any = F.grid_sample(source, coordinates, mode, padding_mode="reflection", align_corners=True)
    if mode == "bicubic":
        result = result.clamp(0, 1)  # it overshoots
    return (result if each.dim() == 4 else result[:, 0]).to(each.dtype)


def _cropped(each: torch.Tensor | None, corners: np.ndarray, size: tuple[int, int]) -> torch.Tensor | None:
    if each is None:
        return None
    windows = zip(each, corners.tolist(), strict=True)
    return torch.stack([one[..., top : top + size[0], left : left + size[1]] for one, (top, left) in windows])
