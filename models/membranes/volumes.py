"""Sections of tissue with labels of their pixels: the ISBI 2012 data, the challenge's TIFFs, folders of pictures."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from models.datasets import places
from models.membranes import stacks
from models.membranes.stacks import Voxel, save_tiff

__all__ = [
    "ISBI_VOXEL",
    "VARIABLE",
    "Volume",
    "Voxel",
    "find",
    "limits",
    "load",
    "open_images",
    "save_tiff",
    "sources",
    "to_unit",
]

#: Names a folder; before the usual places.
VARIABLE = "GPUKERN_ISBI2012"
#: Of the ISBI 2012 data, whose files do not say it: 50 nm between sections, pixels of 4 nm × 4 nm.
ISBI_VOXEL = Voxel(50.0, 4.0, 4.0)
_IMAGES, _LABELS = ("image", "images"), ("label", "labels", "mask", "masks")
#: The challenge's own files: sections, labels.
_VOLUME = ("train-volume", "train-labels")
#: Per cent of the pixels of 16 bits that become black and white; of how many sections.
_TAILS, _SAMPLED = (0.1, 99.9), 16
#: A mask whose edges are grey has at least this share of pixels of the highest value that its dtype has.
_MASK_SHARE = 0.1


@dataclass(frozen=True, eq=False)
class Volume:
    """``images`` [sections, H, W], uint8, uint16, or float32 from 0 to 1; ``labels`` of the same shape, or None.

    A label is True inside a cell and False on a membrane. Sections follow each other in the tissue. TypeError and
    ValueError for other dtypes and shapes.
    """

    images: np.ndarray
    labels: np.ndarray | None
    name: str
    path: Path | None = None
    voxel: Voxel | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 3 or not self.images.size:
            raise ValueError(f"{self.name}: expected images [sections, H, W], got {list(self.images.shape)}")
        if self.images.dtype not in (np.uint8, np.uint16, np.float32):
            raise TypeError(f"{self.name}: expected images of uint8, uint16 or float32, got {self.images.dtype}")
        if self.labels is not None and self.labels.dtype != bool:
            raise TypeError(f"{self.name}: expected labels of bool, got {self.labels.dtype}")
        if self.labels is not None and self.labels.shape != self.images.shape:
            shapes = f"{list(self.images.shape)} and {list(self.labels.shape)}"
            raise ValueError(f"{self.name}: images and labels have different shapes, {shapes}")

    def __len__(self) -> int:
        """How many sections there are."""
        return len(self.images)

    def normalized(self) -> np.ndarray:
        """float32 [sections, H, W] from 0 to 1, what networks are given: :func:`to_unit`."""
        return to_unit(self.images)

    def split(self, train: int | None = None) -> tuple[Volume, Volume]:
        """The first ``train`` sections, to train on, and the others, held out; by default four fifths, 24 of 30.

        Neighbouring sections show the same cells a few nanometres on. So no section is drawn at random: those held
        out lie together at the end. Even so the first of them resembles the last that was trained on, and scores on
        another tissue, or on another block of this one, will be lower.

        ValueError where a part would be empty.
        """
        first = max(1, len(self) * 4 // 5) if train is None else train
        if not 0 < first < len(self):
            raise ValueError(f"{self.name}: {len(self)} sections cannot be split into {first} and the others")
        return self._sections(0, first), self._sections(first, len(self))

    def _sections(self, start: int, stop: int) -> Volume:
        labels = None if self.labels is None else self.labels[start:stop]
        numbers = f"section {stop}" if stop == start + 1 else f"sections {start + 1} to {stop}"
        name = f"{self.name}, {numbers}"
        return replace(self, images=self.images[start:stop], labels=labels, name=name)


def limits(images: np.ndarray) -> tuple[float, float]:
    """The values that become 0 and 1: (0, 255) of uint8, (0, 1) of floats, the 0.1th and 99.9th percentile of uint16.

    A microscope fills its 8 bits, but seldom 16: as a share of 65,535 the contrast of 12 bits would be a sixteenth.
    Of more than 16 sections, 16 are looked at.
    """
    if images.dtype.kind == "f":
        return 0.0, 1.0
    if images.dtype == np.uint8:
        return 0.0, 255.0
    chosen = np.unique(np.linspace(0, len(images) - 1, min(_SAMPLED, len(images))).round().astype(int))
    low, high = np.percentile(images[chosen], _TAILS)
    return float(low), float(max(high, low + 1))


def to_unit(images: np.ndarray, of: tuple[float, float] | None = None, name: object = "images") -> np.ndarray:
    """clip((images − low) / (high − low), 0, 1) in float32, ``of`` being low and high: by default :func:`limits`.

    Sections one at a time want the limits of the whole volume. ValueError, which calls them ``name``, for floats that
    are not from 0 to 1, TypeError for other dtypes than uint8, uint16 and floats.
    """
    if images.dtype.kind == "f":
        return _checked(images, name)
    if images.dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        raise TypeError(f"expected images of uint8, uint16 or float, got {images.dtype}")
    low, high = limits(images) if of is None else of
    unit = (images.astype(np.float32) - np.float32(low)) / np.float32(high - low)
    return np.clip(unit, 0, 1, out=unit)


def _checked(images: np.ndarray, what: object) -> np.ndarray:
    """Floats as float32. ValueError where they are not from 0 to 1."""
    if images.size and not (images.min() >= 0 and images.max() <= 1):  # NaN is in no range
        raise ValueError(
            f"{what}: floats must be from 0 to 1, got {images.min():g} to {images.max():g}: "
            "divide them, or save 8 or 16 bits"
        )
    return images.astype(np.float32, copy=False)


def find() -> Path:
    """Where the ISBI 2012 data are: the variable's place, ``data/isbi2012`` or ``../shared/data/isbi2012``.

    FileNotFoundError that says where they were looked for.
    """
    return places.find("isbi2012", VARIABLE, "the ISBI 2012 data are", "their folder")


def load(path: str | os.PathLike[str] | None = None) -> Volume:
    """Sections and, where there are any, their labels, from what ``path`` is (by default :func:`find`).

    - a folder with ``image`` or ``images`` and ``label``, ``labels``, ``mask`` or ``masks`` of PNG or TIFF files of the
      same names; or one with such folders in ``train``, as the ISBI 2012 data have;
    - a folder with the challenge's ``train-volume.tif`` and ``train-labels.tif``;
    - a folder of pictures, or one file: sections without labels.

    Names are in the order of their numbers: 9, 10, 11. A TIFF may hold any number of sections. Images have 8 or 16
    bits, or are floats from 0 to 1. Labels have two values, 0 for membrane; or more, numbers of cells with 0 between
    them. Masks with grey edges are refused.

    FileNotFoundError where there is no such path; ValueError naming the file for what is damaged or does not fit.
    """
    voxel = ISBI_VOXEL if path is None else None
    path = find() if path is None else Path(path)
    images, labels = _files(path)
    sections = _images(images)
    marks = None if labels is None else _labels(labels, images, [len(part) for part in sections], sections[0].shape[1:])
    whole = path.resolve()
    name = whole.name if path.is_dir() else path.stem
    return Volume(_joined(sections), marks, name, path, stacks.read_voxel(images[0]) or voxel)


def open_images(path: str | os.PathLike[str]) -> np.ndarray:
    """Images [sections, H, W] alone, of what :func:`load` takes; a TIFF of uncompressed pages is mapped, not read.

    For volumes larger than memory: use a few sections at a time, with :func:`limits` of all of them for
    :func:`to_unit`. Floats are checked there. Errors are those of :func:`load`.
    """
    files, _ = _files(Path(path))
    if len(files) > 1:
        return _joined(_images(files))
    images = stacks.open_stack(files[0])
    _check_dtype(files[0], images)
    return images


def sources(path: str | os.PathLike[str]) -> list[Path]:
    """The files that :func:`load` reads."""
    images, labels = _files(Path(path))
    return [*images, *(labels or ())]


def _files(path: Path) -> tuple[list[Path], list[Path] | None]:
    """The files of sections, and those of their labels in the same order."""
    if path.is_file():
        return [path], None
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    for folder in (path, path / "train"):
        images, labels = (_folder(folder, names) for names in (_IMAGES, _LABELS))
        if images and labels:
            return _pairs(images, labels)
        if images or labels:
            missing = _LABELS if images else _IMAGES
            raise ValueError(f"{images or labels}: no folder {' or '.join(missing)} beside it")
    volume, labels = (_volume(path, stem) for stem in _VOLUME)
    if volume:
        return [volume], [labels] if labels else None
    return _pictures(path, f", no folders {_IMAGES[1]} and {_LABELS[1]} of them, and no {_VOLUME[0]}.tif"), None


def _folder(path: Path, names: tuple[str, ...]) -> Path | None:
    return next((path / name for name in names if (path / name).is_dir()), None)


def _volume(path: Path, stem: str) -> Path | None:
    return next(
        (path / f"{stem}{ending}" for ending in (".tif", ".tiff") if (path / f"{stem}{ending}").is_file()), None
    )


def _pictures(folder: Path, more: str = "") -> list[Path]:
    """In the order of the numbers in their names. ValueError where there are none."""
    found = [each for each in folder.iterdir() if each.suffix.lower() in stacks.ENDINGS and each.name[0] != "."]
    if not found:
        raise ValueError(f"{folder}: no pictures ({', '.join(stacks.ENDINGS)}) in it{more}")
    return sorted(found, key=_order)


def _order(path: Path) -> tuple[list[tuple[bool, int, str]], str]:
    parts = re.split(r"(\d+)", path.stem)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts], path.name


def _pairs(images: Path, labels: Path) -> tuple[list[Path], list[Path]]:
    """Files of the same names but for their endings. ValueError naming one that is alone."""
    files, others = _pictures(images), _pictures(labels)
    by_name = _by_name(others)
    for name, file in _by_name(files).items():
        if name not in by_name:
            raise ValueError(f"{file}: no label of this name in {labels}")
    if alone := [other for other in others if other.stem not in _by_name(files)]:
        raise ValueError(f"{alone[0]}: no image of this name in {images}")
    return files, [by_name[file.stem] for file in files]


def _by_name(files: list[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in files:
        if file.stem in found:
            raise ValueError(f"{file}: {found[file.stem].name} beside it has the same name")
        found[file.stem] = file
    return found


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _check_dtype(path: Path, images: np.ndarray) -> None:
    if images.dtype.kind != "f" and images.dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        raise ValueError(f"{path}: expected images of 8 or 16 bits, or floats from 0 to 1, got {images.dtype}")


def _images(files: list[Path]) -> list[np.ndarray]:
    """[sections, H, W] of each file, all of one size and dtype."""
    parts: list[np.ndarray] = []
    for file in files:
        part = stacks.read(file)
        _check_dtype(file, part)
        if part.dtype.kind == "f":
            part = _checked(part, file)
        if parts and (part.shape[1:], part.dtype) != (parts[0].shape[1:], parts[0].dtype):
            raise ValueError(f"{file}: {_size(part)}, but {files[0].name} is {_size(parts[0])}")
        parts.append(part)
    return parts


def _size(part: np.ndarray) -> str:
    return f"{part.shape[1]} × {part.shape[2]} {part.dtype}"


def _labels(files: list[Path], images: list[Path], counts: list[int], size: tuple[int, ...]) -> np.ndarray:
    """Whether a pixel is inside a cell. ValueError where a file does not fit its images."""
    parts = []
    for file, image, count in zip(files, images, counts, strict=True):
        part = stacks.read(file)
        if part.shape != (count, *size):
            got, wanted = (" × ".join(map(str, shape)) for shape in (part.shape, (count, *size)))
            raise ValueError(f"{file}: {got} labels for {wanted} pixels of {image.name}")
        parts.append(inside(part, file))
    return _joined(parts)


def inside(labels: np.ndarray, path: Path) -> np.ndarray:
    """Whether a label is of a cell: bool of two values, 0 for membrane, or of numbers of cells with 0 between them.

    ValueError naming ``path`` for fractions and negative numbers, for two values of which none is 0, and for a mask
    with grey edges.
    """
    if labels.dtype == bool:
        return labels
    values, counts = np.unique(labels, return_counts=True)
    if values[0] < 0 or (labels.dtype.kind == "f" and (values != np.floor(values)).any()):
        raise ValueError(f"{path}: expected labels of whole numbers from 0, got {values[0]} to {values[-1]}")
    if len(values) == 2 and values[0] > 0:
        raise ValueError(f"{path}: expected labels of 0 and another number, got {values[0]} and {values[1]}")
    highest = np.iinfo(labels.dtype).max if labels.dtype.kind in "iu" else 255
    if len(values) > 2 and values[-1] == highest and counts[-1] >= _MASK_SHARE * labels.size:
        between = f"{len(values) - 2} values between 0 and {highest}, such as {values[len(values) // 2]}"
        raise ValueError(f"{path}: a mask with {between}: smoothed or compressed with losses? Save it with two values")
    return labels > 0
