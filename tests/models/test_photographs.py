"""Photographs of packages and their crops."""

from __future__ import annotations

import pytest
import torch

from models import photographs


def test_crops_are_images_of_the_size_and_mirrored_in_pairs():
    wide = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    found = list(photographs.crops(32, [("wide", wide), ("square", wide[:, :, :40])]))
    names = [name for name, _ in found]
    # A square has one largest crop, of a wide photograph left, middle and right.
    assert names.count("wide") == 2 * (3 + 5 + 5) and names.count("square") == 2 * (1 + 5 + 5)
    assert names == sorted(names, reverse=True)
    for (_, image), (_, mirrored) in zip(found[::2], found[1::2], strict=True):
        assert image.shape == (3, 32, 32) and image.dtype is torch.float32
        assert image.min() >= 0 and image.max() <= 1 and image.std() > 0
        assert torch.equal(image.flip(2), mirrored)


def test_photographs_are_in_colour():
    pytest.importorskip("skimage", reason="pip install scikit-image")
    found = photographs.photographs()
    assert len({name for name, _ in found}) == len(found) == 17
    for name, photo in found:
        assert photo.dtype is torch.uint8 and photo.dim() == 3 and len(photo) == 3, name
        assert photo.float().std() > 5, name


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "skimage.data", None)
    with pytest.raises(RuntimeError, match=r"skimage.* is missing, of the extra train"):
        photographs.photographs()
