"""Photographs that packages ship, with crops and flips of them: real images without a download.

scikit-image's own (a cat, a cup of coffee, a rocket, ...) and scikit-learn's two. They have no labels of ImageNet: they
are for comparing what two networks say.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

#: scikit-image's photographs in colour or grey; not its drawings, patterns and measurements.
_SCIKIT_IMAGE = (
    "astronaut", "camera", "cat", "coffee", "coins", "rocket", "brick", "grass", "gravel", "clock", "hubble_deep_field",
    "immunohistochemistry", "moon", "retina", "page",
)  # fmt: skip
#: Shares of the shorter side that the square crops have, and where they lie.
_ZOOMS = (1.0, 0.8, 0.6)
_PLACES = ((0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))


def photographs() -> list[tuple[str, torch.Tensor]]:
    """(name, uint8 [3, H, W]) of each. RuntimeError where a package is missing."""
    try:
        import skimage.data
        from sklearn.datasets import load_sample_images
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{error.name} is missing, of the extra train: pip install -e '.[train]'") from error
    found = [(name, getattr(skimage.data, name)()) for name in _SCIKIT_IMAGE]
    samples = load_sample_images()
    found += [(name.rpartition("/")[2], image) for name, image in zip(samples.filenames, samples.images, strict=True)]
    return [(name, _in_colour(image)) for name, image in found]


def crops(size: int = 224, of: list[tuple[str, torch.Tensor]] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """(photograph's name, float32 [3, ``size``, ``size``] from 0 to 1): square crops, each also mirrored.

    Of one photograph, all crops follow each other: whoever divides the images should divide the photographs.
    """
    for name, photo in photographs() if of is None else of:
        height, width = photo.shape[1:]
        edges = [round(zoom * min(height, width)) for zoom in _ZOOMS]
        # In a square photograph the largest crops are all the same.
        boxes = dict.fromkeys(
            (round(down * (height - edge)), round(right * (width - edge)), edge)
            for edge in edges
            for down, right in _PLACES
        )
        for top, left, edge in boxes:
            crop = photo[:, top : top + edge, left : left + edge].float()[None] / 255
            image = F.interpolate(crop, (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
            yield name, image.clamp(0, 1)
            yield name, image.flip(2).clamp(0, 1)


def _in_colour(image: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(np.array(image))  # a copy: some are read-only
    if tensor.dim() == 2:
        tensor = tensor[..., None].expand(*tensor.shape, 3)
    return tensor[..., :3].permute(2, 0, 1)
