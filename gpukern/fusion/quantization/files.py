"""Batches for calibration from files: a folder of images, or arrays that are ready for the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpukern.fusion.errors import SourceError, first_line

#: What most networks for ImageNet were trained with.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: The side of the crop, as a share of the shorter side that an image is resized to.
_CROP = 0.875
#: Images in a batch of those that come one by one.
_BATCH = 16
_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
_ARRAYS = (".npy", ".npz", ".pt", ".pth")


@dataclass(frozen=True)
class Preparation:
    """How images become inputs: ``resize`` of the shorter side (by default so that the crop is 87.5 % of it), a crop of
    the input's size from the middle, numbers in 0 … 1, minus ``mean``, over ``deviation``, of each channel."""

    resize: int | None = None
    mean: tuple[float, ...] | None = None
    deviation: tuple[float, ...] | None = None


def batches_from(path: Path, shapes: Sequence[Sequence[int]], preparation: Preparation) -> Any:
    """Batches from a folder of images, with all below it, or from an .npy, .npz or .pt file, for inputs of ``shapes``.

    SourceError for what cannot be read.
    """
    if path.is_dir():
        return _Folder(path, shapes, preparation)
    if not path.exists():
        raise SourceError(f"there is no {path}")
    if path.suffix not in _ARRAYS:
        raise SourceError(f"{path} is neither a folder of images nor one of {', '.join(_ARRAYS)}")
    try:
        arrays = _arrays(path)
    except Exception as problem:  # numpy, zipfile, pickle and torch raise errors of all kinds
        raise SourceError(f"{path} cannot be read: {first_line(problem)}") from None
    return _in_batches(path, arrays, len(shapes))


def _arrays(path: Path) -> list[Any]:
    if path.suffix in (".pt", ".pth"):
        found = torch.load(path, map_location="cpu", weights_only=True)
        return [found] if isinstance(found, torch.Tensor) else list(found)
    import numpy

    found = numpy.load(path, allow_pickle=False)
    arrays = [found] if path.suffix == ".npy" else [found[name] for name in found.files]
    return [torch.from_numpy(array) for array in arrays]


def _in_batches(path: Path, arrays: list[Any], inputs: int) -> list[Any]:
    """One array of many rows in parts; several, those of one batch each, or of the inputs."""
    tensors = all(isinstance(each, torch.Tensor) and each.dim() for each in arrays)
    if not arrays:
        raise SourceError(f"{path} is empty")
    if tensors and inputs > 1 and len(arrays) == inputs:
        return list(zip(*(each.split(_BATCH) for each in arrays), strict=True))
    if tensors and len(arrays) == 1:
        return list(arrays[0].split(_BATCH))
    return arrays


class _Folder:
    """The images of a folder in batches, read as they are asked for."""

    def __init__(self, path: Path, shapes: Sequence[Sequence[int]], preparation: Preparation) -> None:
        if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1] not in (1, 3):
            raise SourceError(
                "a folder of images is for a model with one input of 1 or 3 channels: give an .npz or .pt"
            )
        try:
            import PIL.Image  # noqa: F401 - that it is there is asked now, not after minutes
        except ImportError:
            raise SourceError("images are read by Pillow: pip install Pillow, or give an .npy, .npz or .pt") from None
        self.files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _IMAGES)
        if not self.files:
            raise SourceError(f"{path} has no images ({', '.join(_IMAGES)})")
        _, self.channels, self.height, self.width = shapes[0]
        self.preparation = preparation
        for name in ("mean", "deviation"):
            given = getattr(preparation, name)
            if given is not None and len(given) not in (1, self.channels):
                raise SourceError(f"the {name} has {len(given)} numbers, images have {self.channels} channels")

    def __len__(self) -> int:
        return math.ceil(len(self.files) / _BATCH)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for start in range(0, len(self.files), _BATCH):
            yield torch.stack([self._image(file) for file in self.files[start : start + _BATCH]])

    def _image(self, file: Path) -> torch.Tensor:
        import numpy
        from PIL import Image

        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB" if self.channels == 3 else "L")
        except OSError as problem:
            raise SourceError(f"{file} is no image: {problem}") from None
        image = self._cropped(image)
        pixels = torch.from_numpy(numpy.asarray(image, dtype=numpy.float32) / 255)
        pixels = pixels.view(self.height, self.width, self.channels).permute(2, 0, 1)
        color = self.channels == 3
        mean = torch.tensor(self.preparation.mean or (MEAN if color else (0.0,))).view(-1, 1, 1)
        deviation = torch.tensor(self.preparation.deviation or (DEVIATION if color else (1.0,))).view(-1, 1, 1)
        return (pixels - mean) / deviation

    def _cropped(self, image: Any) -> Any:
        from PIL import Image

        shorter = self.preparation.resize or round(max(self.height, self.width) / _CROP)
        factor = max(shorter / min(image.size), self.width / image.size[0], self.height / image.size[1])
        size = (max(self.width, round(image.size[0] * factor)), max(self.height, round(image.size[1] * factor)))
        image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = (size[0] - self.width) // 2, (size[1] - self.height) // 2
        return image.crop((left, top, left + self.width, top + self.height))
