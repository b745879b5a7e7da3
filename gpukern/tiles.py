"""A network for images run over one of any size, tile by tile, each with its surroundings."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from gpukern.runtime.arguments import as_pair

BORDERS = ("reflect", "symmetric", "replicate", "constant")
#: Before and after, vertically and horizontally.
Margin = tuple[tuple[int, int], tuple[int, int]]
Places = list[tuple[int, int]]


def predict_tiles(
    network: Callable[[torch.Tensor], torch.Tensor],
    image: Any,
    *,
    tile: int | tuple[int, int],
    margin: int | tuple[int, int] | Margin = 0,
    multiple: int | tuple[int, int] = 1,
    border: str = "reflect",
    batch_size: int = 1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    before: Callable[[torch.Tensor], torch.Tensor] | None = None,
    after: Callable[[torch.Tensor], torch.Tensor] | None = None,
    out: Any = None,
    progress: bool = False,
) -> Any:
    """``y[:, i, j] = network(image around tile)[:, i − top, j − left]``: the overlap-tile strategy.

    The image needs not be in memory: tiles are read one after the other, and written where they belong. Every tile has
    the same size; the last ones reach over the image's border. The result is that of the whole image with such a border
    if a pixel of the output depends on no more than ``margin`` pixels around it.

    Parameters
    ----------
    network:
        [n, C, top + tile + bottom, left + tile + right] → [n, K, tile, tile], or an output of the input's size, whose
        margins are cut off. A module is run in the mode it is in, without gradients.
    image:
        [C, H, W]: a tensor, an array, or anything with a ``shape`` and slices that numpy takes, such as a memory map.
    tile:
        height and width of a tile of the output, an int for both. It may be larger than the image.
    margin:
        pixels of surroundings that the network reads: an int, (vertical, horizontal), or
        ((top, bottom), (left, right)).
    multiple:
        tiles begin at multiples of this many pixels: 2^depth of a U-Net, whose output moves with its input by such.
    border:
        what lies outside of the image: "reflect" and "symmetric" mirror it without and with its outermost pixels, as
        often as necessary, "replicate" repeats these, "constant" is 0.
    batch_size:
        tiles at once.
    device, dtype:
        of what the network is given; by default of its first floating-point parameter (otherwise the CPU, float32).
    before, after:
        called with a batch of tiles before, and with the output after the network: to normalize, for probabilities.
    out:
        where the result goes: [K, H, W], anything that slices can be assigned to. By default a new tensor on the CPU,
        or an array if ``image`` is no tensor.
    progress:
        show a progress bar.

    Returns
    -------
    [K, H, W], or ``out``.

    Raises
    ------
    TypeError and ValueError for arguments that fit neither each other nor the image, before the network runs;
    RuntimeError where the network's output has neither size.

    Source: Ronneberger et al., "U-Net", MICCAI 2015, section 2.
    """
    image_shape = _shape_of(image)
    layout = _Layout(image_shape[1:], as_pair("tile", tile), _margins(margin), as_pair("multiple", multiple))
    if border not in BORDERS:
        raise ValueError(f"border must be one of {', '.join(BORDERS)}, got {border!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if out is not None and (len(out.shape) != 3 or tuple(out.shape[1:]) != image_shape[1:]):
        raise ValueError(f"out must be [K, {image_shape[1]}, {image_shape[2]}], got {list(out.shape)}")
    device, dtype = _place(network, device, dtype)
    places = layout.places()
    with torch.no_grad(), _bar(progress, len(places)) as advance:
        for first in range(0, len(places), batch_size):
            batch = places[first : first + batch_size]
            tiles = torch.stack([_read(image, layout.rows(place), border) for place in batch])
            tiles = tiles.to(device, dtype)
            tiles = layout.cut(network(before(tiles) if before else tiles))
            tiles = (after(tiles) if after else tiles).cpu()
            if out is None:
                out = _new(image, tiles, image_shape)
            elif out.shape[0] != tiles.shape[1]:
                raise ValueError(f"out has {out.shape[0]} channels, the network's output {tiles.shape[1]}")
            for (top, left), values in zip(batch, tiles, strict=True):
                _write(out, values, top, left)
            advance(len(batch))
    return out


class _Layout:
    """Where tiles lie: ``step`` pixels apart, each with its margins."""

    def __init__(
        self, size: tuple[int, int], tile: tuple[int, int], margins: Margin, multiple: tuple[int, int]
    ) -> None:
        for name, given in (("tile", tile), ("multiple", multiple)):
            if min(given) < 1:
                raise ValueError(f"{name} must be positive, got {given}")
        if any(side < of for side, of in zip(tile, multiple, strict=True)):
            raise ValueError(f"a tile of {tile} holds no multiple of {multiple}: tiles begin at such")
        if min(itertools.chain(*margins)) < 0:
            raise ValueError(f"margin must not be negative, got {margins}")
        self._size, self._tile, self._margins = size, tile, margins
        self._step = tuple(side - side % of for side, of in zip(tile, multiple, strict=True))

    def places(self) -> Places:
        """First rows and columns, as few as cover the image."""
        starts = [
            range(0, max(size - (tile - step), 1), step)
            for size, tile, step in zip(self._size, self._tile, self._step, strict=True)
        ]
        return [(top, left) for top, left in itertools.product(*starts)]

    def rows(self, place: tuple[int, int]) -> list[np.ndarray]:
        """The rows and the columns of the image that a tile is given, those outside of it too."""
        return [
            np.arange(start - before, start + tile + behind)
            for start, tile, (before, behind) in zip(place, self._tile, self._margins, strict=True)
        ]

    def cut(self, output: torch.Tensor) -> torch.Tensor:
        """``output`` without margins. RuntimeError for one that is no image of a tile's size, with or without them."""
        whole = tuple(tile + sum(margin) for tile, margin in zip(self._tile, self._margins, strict=True))
        size = tuple(output.shape[2:])
        if output.dim() != 4 or size not in (self._tile, whole):
            raise RuntimeError(
                f"the network made {list(output.shape)} of tiles with margins of {whole[0]} × {whole[1]}: expected "
                f"[n, K, {self._tile[0]}, {self._tile[1]}] or the size of its input{_lost(whole, size)}"
            )
        if size == self._tile:
            return output
        (top, _), (left, _) = self._margins
        return output[:, :, top : top + self._tile[0], left : left + self._tile[1]]


def _lost(whole: tuple[int, ...], size: tuple[int, ...]) -> str:
    """Which margins fit a network that makes images of ``size`` of ``whole``, in words; nothing where none do."""
    lost = [before - after for before, after in zip(whole, size, strict=False)]
    if len(size) != 2 or min(lost) < 0:
        return ""
    return f"; a network that always gives {lost[0]} rows and {lost[1]} columns less needs margins of as many in all"


def _shape_of(image: Any) -> tuple[int, int, int]:
    shape = tuple(getattr(image, "shape", ()))
    if len(shape) != 3:
        raise ValueError(f"image must be [C, H, W], got {list(shape) or type(image).__name__}")
    if 0 in shape:
        raise ValueError(f"image has no pixels: {list(shape)}")
    return shape  # type: ignore[return-value]


def _margins(margin: int | tuple[int, int] | Margin) -> Margin:
    vertical, horizontal = margin if isinstance(margin, (tuple, list)) else (margin, margin)
    return as_pair("margin", vertical), as_pair("margin", horizontal)


def _place(
    network: Any, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    parameters = network.parameters() if isinstance(network, torch.nn.Module) else ()
    first = next((each for each in parameters if each.is_floating_point()), None)
    found = (first.device, first.dtype) if first is not None else (torch.device("cpu"), torch.float32)
    return torch.device(device) if device is not None else found[0], dtype or found[1]


def _read(image: Any, wanted: list[np.ndarray], border: str) -> torch.Tensor:
    """The rows and columns ``wanted`` of all channels; only what they are made of is read."""
    inside = [_inside(places, size, border) for places, size in zip(wanted, image.shape[1:], strict=True)]
    (top, bottom), (left, right) = [(places.min(), places.max() + 1) for places in inside]
    block = image[:, top:bottom, left:right]
    rows, columns = inside[0] - top, inside[1] - left
    if not isinstance(block, torch.Tensor):
        block = np.asarray(block)
        # Files of another byte order can be mapped, but torch takes this machine's only.
        block = torch.from_numpy(np.array(block, block.dtype.newbyteorder("=")))
    if not block.is_floating_point():
        block = block.float()  # some integers can be stored and not indexed
    for dimension, places in ((1, rows), (2, columns)):
        if len(places) != block.shape[dimension] or (np.diff(places) != 1).any():
            block = block.index_select(dimension, torch.from_numpy(places).to(block.device))
    if border == "constant":
        for dimension, (places, size) in enumerate(zip(wanted, image.shape[1:], strict=True), start=1):
            outside = torch.from_numpy((places < 0) | (places >= size)).to(block.device)
            block = block.masked_fill(outside.unsqueeze(1) if dimension == 1 else outside, 0)
    return block


def _inside(places: np.ndarray, size: int, border: str) -> np.ndarray:
    """For places along an axis, which may lie outside, those inside that they show."""
    if border in ("replicate", "constant") or size == 1:
        return places.clip(0, size - 1)
    period = 2 * size - (2 if border == "reflect" else 0)
    places = places % period
    return np.where(places < size, places, (period if border == "reflect" else period - 1) - places)


def _new(image: Any, tiles: torch.Tensor, shape: tuple[int, int, int]) -> Any:
    out = torch.empty(tiles.shape[1], *shape[1:], dtype=tiles.dtype)
    return out if isinstance(image, torch.Tensor) else _as_array(out)


def _as_array(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()


def _write(out: Any, values: torch.Tensor, top: int, left: int) -> None:
    """What of a tile lies in the image."""
    values = values[:, : out.shape[1] - top, : out.shape[2] - left]
    place = slice(None), slice(top, top + values.shape[1]), slice(left, left + values.shape[2])
    out[place] = values if isinstance(out, torch.Tensor) else _as_array(values)


@contextlib.contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar, and what moves it on."""
    if not shown:
        yield lambda done: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("tiles", total=total)
        yield lambda done: progress.advance(task, done)
