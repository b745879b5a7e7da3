"""Few colours for many segments, so that neighbours differ."""

from __future__ import annotations

import numpy as np

#: Well apart, light and dark (after Okabe and Ito, for all kinds of colour vision).
PALETTE = np.array(
    [
        (0.90, 0.62, 0.00),
        (0.34, 0.71, 0.91),
        (0.00, 0.62, 0.45),
        (0.94, 0.89, 0.26),
        (0.00, 0.45, 0.70),
        (0.84, 0.37, 0.00),
        (0.80, 0.47, 0.65),
        (0.55, 0.34, 0.75),
    ]
)
#: Pixels across a border within which two segments are neighbours.
_REACH = 6


def coloured(labels: np.ndarray) -> np.ndarray:
    """[H, W, 3] of ``labels``, integers [H, W]: a colour of :data:`PALETTE` for each, black where they are 0.

    Neighbours get different colours, as far as there are enough: each label, in the order of their numbers, gets the
    one that its neighbours have least.
    """
    from skimage.segmentation import expand_labels

    chosen = np.zeros(int(labels.max()) + 1, int)
    near = _neighbours(expand_labels(labels, _REACH))
    for label in np.unique(labels[labels > 0]):
        taken = np.bincount([chosen[other] for other in near.get(label, ()) if other < label], minlength=len(PALETTE))
        # Of those that are least taken, another one for each label: the first ones would be everywhere.
        order = (np.arange(len(PALETTE)) + label) % len(PALETTE)
        chosen[label] = order[taken[order].argmin()]
    colours = PALETTE[chosen]
    colours[0] = 0
    return colours[labels]


def _neighbours(labels: np.ndarray) -> dict[int, set[int]]:
    """Which labels touch which."""
    found: dict[int, set[int]] = {}
    for first, second in ((labels[:, 1:], labels[:, :-1]), (labels[1:], labels[:-1])):
        touching = (first != second) & (first > 0) & (second > 0)
        for one, other in np.unique(np.stack([first[touching], second[touching]], 1), axis=0).tolist():
            found.setdefault(one, set()).add(other)
            found.setdefault(other, set()).add(one)
    return found
