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
    seen = windows(images, places, key, offset, random, size, padding, padding_mode, flip, cutout)
    return take(images, source, seen, mean, scale, fill, dtype)


class Windows(NamedTuple):
    """What each sample sees: rows [samples, height, 1] and columns [samples, 1, width] of its image; which of its
    pixels [samples, height, width, 1] lie outside, and which are cut out, if any are."""

    rows: torch.Tensor
    columns: torch.Tensor
    outside: torch.Tensor | None
    cut: torch.Tensor | None


def windows(
    images: torch.Tensor,
    places: torch.Tensor,
    key: int,
    offset: int,
    random: bool,
    size: list[int],
    padding: list[int],
    padding_mode: str,
    flip: float,
    cutout: int,
) -> Windows:
    """What the samples of these numbers see of their images."""
    sides = sides_of(images, size, padding, padding_mode, random)
    row, column = (torch.arange(each, device=images.device).expand(len(places), -1) for each in size)
    cut = None
    if random:
        drawn = _draw(places, key, offset, sides, size, flip_threshold(flip))
        row = row + drawn.down[:, None]
        column = torch.where(drawn.flipped[:, None], size[1] - 1 - column, column) + drawn.right[:, None]
        cut = _cut(drawn, size, cutout).unsqueeze(3) if cutout else None
    rows, outside_rows = _inside(row + sides[0].first, images.shape[1], padding_mode)
    columns, outside_columns = _inside(column + sides[1].first, images.shape[2], padding_mode)
    outside = None
    if padding_mode == "constant" and (sides[0].outside or sides[1].outside):
        outside = (outside_rows.unsqueeze(2) | outside_columns.unsqueeze(1)).unsqueeze(3)
    return Windows(rows.unsqueeze(2), columns.unsqueeze(1), outside, cut)


def take(
    images: torch.Tensor,
    source: torch.Tensor,
    seen: Windows,
    mean: torch.Tensor,
    scale: torch.Tensor,
    fill: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The normalized samples of ``source``, in at least fp32 until the end."""
    x = _pixels(images, source, seen).to(torch.promote_types(dtype, torch.float32))
    if seen.outside is not None:
        x.masked_fill_(seen.outside, fill)
    x.sub_(mean[seen.rows, seen.columns] if mean.dim() == 3 else mean).mul_(scale)
    if seen.cut is not None:
        x.masked_fill_(seen.cut, 0.0)
    return x.to(dtype).permute(0, 3, 1, 2)


def _pixels(images: torch.Tensor, source: torch.Tensor, seen: Windows) -> torch.Tensor:
    if not images.is_contiguous():
        return images[source[:, None, None], seen.rows, seen.columns]
    _, H, W, C = images.shape
    at = (source[:, None, None] * H + seen.rows) * W + seen.columns
    # Rows of a matrix are copied whole: a quarter of the time on a CPU.
    return images.view(-1, C).index_select(0, at.flatten()).view(*at.shape, C)


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
