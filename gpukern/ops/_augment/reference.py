"""The input pipeline in plain torch, with the same random numbers as the kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gpukern.ops._augment.problem import Side, centre_side, random_side
from gpukern.ops._dropout.reference import philox

_LOW = 2**32 - 1


def augment(
    images: torch.Tensor,
    index: torch.Tensor | None,
    places: torch.Tensor | None,
    mean: torch.Tensor,
    scale: torch.Tensor,
    key: int,
    offset: int,
    random: bool,
    size: list[int],
    padding: list[int],
    padding_mode: str,
    fill: float,
    flip: float,
    cutout: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``(x − mean) · scale`` of crops; see :data:`gpukern.ops.augment.augment`. IndexError for an unknown image."""
    source = torch.arange(len(images), device=images.device) if index is None else index.long()
    if index is not None and bool(((source < 0) | (source >= len(images))).any()):
        raise IndexError(f"index out of range: there are {len(images)} images")
    places = source if places is None else places.long()
    sides = sides_of(images, size, padding, padding_mode, random)
    drawn = _draw(places, key, offset, sides, size, flip_threshold(flip)) if random else None
    rows, columns = _pixels(drawn, sides, size, len(source), images.device)
    (h, outside_h), (w, outside_w) = (
        _inside(each, length, padding_mode) for each, length in zip((rows, columns), images.shape[1:3], strict=True)
    )
    h, w = h.unsqueeze(2), w.unsqueeze(1)
    wide = torch.promote_types(dtype, torch.float32)
    x = images[source[:, None, None], h, w].to(wide)
    if padding_mode == "constant" and (sides[0].outside or sides[1].outside):
        x.masked_fill_((outside_h.unsqueeze(2) | outside_w.unsqueeze(1)).unsqueeze(3), fill)
    x.sub_(mean[h, w] if mean.dim() == 3 else mean).mul_(scale)
    if random and cutout and drawn is not None:
        x.masked_fill_(_cut(drawn, size, cutout).unsqueeze(3), 0.0)
    return x.to(dtype).permute(0, 3, 1, 2)


def flip_threshold(flip: float) -> int:
    """Of 2³² numbers, how many flip."""
    return round(flip * 2**32)


def sides_of(
    images: torch.Tensor, size: list[int], padding: list[int], padding_mode: str, random: bool
) -> tuple[Side, Side]:
    """The crops along both sides of [N, H, W, C]."""
    (H, W), (h, w) = images.shape[1:3], size
    if random:
        return random_side(H, h, padding[0], padding_mode), random_side(W, w, padding[1], padding_mode)
    return centre_side(H, h, padding_mode), centre_side(W, w, padding_mode)


class _Drawn(NamedTuple):
    """Of each sample: how far its crop lies from the first one, whether it is flipped, and the cutout's middle."""

    down: torch.Tensor
    right: torch.Tensor
    flipped: torch.Tensor
    cut_row: torch.Tensor
    cut_column: torch.Tensor


def _draw(places: torch.Tensor, key: int, offset: int, sides: tuple[Side, Side], size: list[int], flip: int) -> _Drawn:
    by_row, by_column, by_flip, by_cutout = philox(places & _LOW, places >> 32 & _LOW, key, offset)
    by_cutout = by_cutout * size[0]
    return _Drawn(
        by_row * sides[0].choices >> 32,
        by_column * sides[1].choices >> 32,
        by_flip < flip,
        by_cutout >> 32,
        (by_cutout & _LOW) * size[1] >> 32,
    )


def _pixels(
    drawn: _Drawn | None, sides: tuple[Side, Side], size: list[int], samples: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns, [samples, size], of every sample's crop."""
    row, column = (torch.arange(each, device=device).expand(samples, -1) for each in size)
    if drawn is not None:
        row = row + drawn.down[:, None]
        column = torch.where(drawn.flipped[:, None], size[1] - 1 - column, column) + drawn.right[:, None]
    return row + sides[0].first, column + sides[1].first


def _inside(place: torch.Tensor, size: int, padding_mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The pixels of the image that are seen at ``place``, and which of these lie outside."""
    outside = (place < 0) | (place >= size)
    if padding_mode == "reflect":
        place = place.abs()
        place = torch.where(place >= size, 2 * (size - 1) - place, place)
    elif padding_mode == "symmetric":
        place = torch.where(place < 0, -1 - place, place)
        place = torch.where(place >= size, 2 * size - 1 - place, place)
    return place.clamp(0, size - 1), outside


def _cut(drawn: _Drawn, size: list[int], cutout: int) -> torch.Tensor:
    """Which pixels, [samples, height, width], a square around its middle covers."""
    covered = []
    for middle, length in zip((drawn.cut_row, drawn.cut_column), size, strict=True):
        from_edge = torch.arange(length, device=middle.device) - (middle[:, None] - cutout // 2)
        covered.append((from_edge >= 0) & (from_edge < cutout))
    return covered[0].unsqueeze(2) & covered[1].unsqueeze(1)
