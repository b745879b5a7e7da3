"""From probabilities of being inside a cell to labels of cells: thresholds, thin borders, watersheds. Per section."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def components(inside: np.ndarray) -> np.ndarray:
    """int32 labels from 1 of the 4-connected components of ``inside``, bool [H, W] or [sections, H, W]; 0 elsewhere.

    Numbers begin again in each section: two sections share no cell.
    """
    from scipy import ndimage

    _require(inside.dtype == bool, TypeError, f"expected bool, True inside a cell, got {inside.dtype}")
    return _by_section(inside, lambda section: ndimage.label(section, output=np.int32)[0])


def thinned(inside: np.ndarray) -> np.ndarray:
    """The same components, grown until the borders between them are one pixel wide: int32, 0 on borders.

    They grow by city-block steps at one speed, in the watershed of a flat surface with 4-connected neighbours, as
    the challenge's metrics do it (Soille and Vincent 1990, by ``WatershedTransform2D`` of Fiji): how wide a network
    draws a membrane then hardly counts. A section of borders alone becomes one segment, as in Fiji.
    """
    from skimage.segmentation import watershed as flood

    def grow(labels: np.ndarray) -> np.ndarray:
        if not labels.any():
            return np.ones_like(labels)
        return flood(np.zeros(labels.shape, np.uint8), labels, connectivity=1, watershed_line=True)

    return _by_section(components(inside), grow)


def watershed(probabilities: np.ndarray, threshold: float = 0.5, depth: float = 3.0, smallest: int = 16) -> np.ndarray:
    """int32 labels of cells without borders: the watershed of 1 − ``probabilities``, [H, W] or [sections, H, W].

    It begins in the parts of the thresholded cells that are at least ``depth`` pixels from their edge, so that two
    cells that touch in a gap of a membrane are two basins. Where a component is too thin for that it is a basin as a
    whole, unless it has fewer pixels than ``smallest``. Every pixel of a section gets a label from 1; where no basin
    begins, all are 0.

    ValueError for probabilities or a threshold that are not from 0 to 1.
    """
    from scipy import ndimage
    from skimage.segmentation import watershed as flood

    probabilities = checked_probabilities(probabilities)
    _require(0 <= threshold <= 1, ValueError, f"a threshold must be from 0 to 1, got {threshold}")

    def segment(section: np.ndarray) -> np.ndarray:
        cells = components(section > threshold)
        # Beyond the picture lies no membrane: a cell is not thin because it is cut off.
        padded = np.pad(cells > 0, int(depth) + 1, mode="edge")
        inner = slice(int(depth) + 1, -int(depth) - 1)
        cores = (ndimage.distance_transform_edt(padded)[inner, inner] >= depth) & (cells > 0)
        thin = np.bincount(cells.ravel()) >= smallest
        thin[0] = False
        thin[np.unique(cells[cores])] = False
        return flood(1 - section, components(cores | thin[cells]), connectivity=1)

    return _by_section(probabilities, segment)


def checked_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """float32 or float64. TypeError for other numbers; ValueError where they are not from 0 to 1."""
    _require(probabilities.dtype.kind == "f", TypeError, f"expected probabilities of float, got {probabilities.dtype}")
    fits = bool(probabilities.size and probabilities.min() >= 0 and probabilities.max() <= 1)  # NaN is in no range
    _require(fits, ValueError, "expected probabilities from 0 to 1")
    return probabilities.astype(np.float32) if probabilities.dtype == np.float16 else probabilities


def _by_section(stack: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    shape = list(stack.shape)
    _require(stack.ndim in (2, 3), ValueError, f"expected a section [H, W] or [sections, H, W], got {shape}")
    if stack.ndim == 2:
        return function(stack)
    return np.stack([function(section) for section in stack]) if len(stack) else np.zeros(shape, np.int32)


def _require(fact: bool, kind: type[Exception], words: str) -> None:
    if not fact:
        raise kind(words)
