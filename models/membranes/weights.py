"""How much each pixel counts in the loss of U-Net: membranes more than the insides of cells, thin membranes most."""

from __future__ import annotations

import math

import numpy as np

from models.membranes.segmentation import components
from models.progress import tracked

#: In units of sigma: a cell farther away than this is not there; its share of a weight would be below w0·exp(−8).
_REACH = 4.0


def border_weights(
    labels: np.ndarray, w0: float = 10.0, sigma: float = 5.0, balance: bool = True, progress: bool = True
) -> np.ndarray:
    """float32 w = w_c + w0 · exp(−(d1 + d2)² / (2 sigma²)), of the shape of ``labels``.

    d1 and d2 are the distances in pixels from a pixel of membrane to the nearest and to the second nearest cell, a
    4-connected component of its section; farther than 4 sigma they are infinite. Inside cells the second term is 0.
    w_c makes both classes count as much in the mean over all pixels, and is 1 in the mean; without ``balance``, and
    where there is one class, it is 1 everywhere. ``progress`` shows a bar on a terminal.

    Ronneberger et al., "U-Net: convolutional networks for biomedical image segmentation", MICCAI 2015, equation 2.

    Parameters
    ----------
    labels:
        bool [sections, H, W] or [H, W], True inside a cell.
    w0:
        the weight that a membrane gets beyond its class's where two cells touch it from both sides, at least 0.
    sigma:
        in pixels, above 0: membranes up to about twice as wide are emphasized.

    TypeError for labels of other dtypes, ValueError for other shapes and numbers.
    """
    if labels.dtype != bool:
        raise TypeError(f"expected labels of bool, True inside a cell, got {labels.dtype}")
    if labels.ndim not in (2, 3):
        raise ValueError(f"expected labels [sections, H, W] or [H, W], got {list(labels.shape)}")
    if not (0 <= w0 < math.inf and 0 < sigma < math.inf):
        raise ValueError(f"w0 must be at least 0 and sigma above 0, got {w0} and {sigma}")
    stack = labels if labels.ndim == 3 else labels[None]
    weights = _class_weights(stack, balance)
    for index in tracked(range(len(stack)), "weights of borders", progress):
        both = _two_distances(components(stack[index]), _REACH * sigma)
        weights[index] += np.where(stack[index], 0, w0 * np.exp(-(both**2) / (2 * sigma**2)))
    return weights.reshape(labels.shape)


def _class_weights(labels: np.ndarray, balance: bool) -> np.ndarray:
    inside = labels.mean() if labels.size else 0.0
    if not balance or inside in (0, 1):
        return np.ones(labels.shape, np.float32)
    return np.where(labels, 0.5 / inside, 0.5 / (1 - inside)).astype(np.float32)


def _two_distances(cells: np.ndarray, reach: float) -> np.ndarray:
    """float64 [H, W]: the sum of the distances to the two nearest of ``cells``; infinite where one is beyond ``reach``.

    A cell's distances are taken in a box around it alone: the time grows with the boxes' area, not with the cells.
    """
    from scipy import ndimage

    nearest, second = (np.full(cells.shape, np.inf) for _ in range(2))
    margin = math.ceil(reach)
    for number, (down, across) in enumerate(ndimage.find_objects(cells), 1):
        box = (
            slice(max(0, down.start - margin), down.stop + margin),
            slice(max(0, across.start - margin), across.stop + margin),
        )
        distance = ndimage.distance_transform_edt(cells[box] != number)
        distance[distance > reach] = np.inf
        # In place: these are views.
        np.minimum(second[box], np.maximum(nearest[box], distance), out=second[box])
        np.minimum(nearest[box], distance, out=nearest[box])
    return nearest + second
