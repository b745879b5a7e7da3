"""Crops of images as a problem: where they may begin, how far they reach beyond. Imports neither torch nor Triton."""

from __future__ import annotations

from typing import NamedTuple

from gpukern.runtime.integers import require

#: What lies outside of an image, by torchvision's names.
PADDING_MODES = ("constant", "edge", "reflect", "symmetric")


class Side(NamedTuple):
    """The crops along one side of an image: ``choices`` places in a row for the first pixel, from ``first`` on.

    ``outside``: whether a crop at one of them has pixels that the image does not have.
    """

    first: int
    choices: int
    outside: bool


def random_side(image: int, size: int, padding: int, mode: str) -> Side:
    """All crops of ``size`` pixels from ``image`` ones with ``padding`` on both ends. ValueError for none."""
    choices = image + 2 * padding - size + 1
    if choices < 1:
        raise ValueError(
            f"required crop of {size} pixels is larger than the image with its padding: {image} + 2 · {padding}"
        )
    _check_padding(image, padding, mode)
    return Side(-padding, choices, padding > 0)


def centre_side(image: int, size: int, mode: str) -> Side:
    """The crop in the middle, as torchvision's ``center_crop`` rounds it: halves to even, or up if it pads."""
    if size > image:
        before = (size - image) // 2
        _check_padding(image, size - image - before, mode)
        return Side(-before, 1, True)
    spare = image - size
    return Side(spare // 2 + (1 if spare % 4 == 3 else 0), 1, False)


def _check_padding(image: int, padding: int, mode: str) -> None:
    """RuntimeError, as of torch's ``pad``, where a mirror image is too short."""
    longest = {"reflect": image - 1, "symmetric": image}.get(mode, padding)
    require(
        padding <= longest,
        f"Padding size should be less than the corresponding input dimension, but got: "
        f"padding of {padding} pixels by {mode!r} at a side of {image}",
    )
