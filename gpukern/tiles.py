"""A network for images run over one of any size, tile by tile, each with its surroundings."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
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
        called with a batch of tiles before the network, in its dtype, and with the output, of the tile's size, after
        it: to normalize, for probabilities.
    out:
        where the result goes: [K, H, W], anything that slices can be assigned to, but for the image's memory. By
        default a new tensor on the CPU, or an array if ``image`` is no tensor. After an error it has the tiles before.
    progress:
        show a progress bar.

    Returns
    -------
    [K, H, W], or ``out``.

    Raises
    ------
    TypeError and ValueError for arguments that fit neither each other nor the image, before the network runs;
    RuntimeError where the output of the network or ``after`` has another size, TypeError where it is no tensor, or
    ``out`` is of integers that do not hold it; ValueError where margins before a tile are no multiples of ``multiple``
    and the network pads: its output would be shifted.

    Source: Ronneberger et al., "U-Net", MICCAI 2015, section 2.
    """
    image_shape = _shape_of(image)
    layout = _Layout(image_shape[1:], as_pair("tile", tile), _margins(margin), as_pair("multiple", multiple))
    if border not in BORDERS:
        raise ValueError(f"border must be one of {', '.join(BORDERS)}, got {border!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    _check_out(out, image, image_shape)
    device, dtype = _place(network, device, dtype)
    places = layout.places()
    with torch.no_grad(), _bar(progress, len(places)) as advance:
        for first in range(0, len(places), batch_size):
            batch = places[first : first + batch_size]
            tiles = torch.stack([_read(image, layout.rows(place), border) for place in batch])
            tiles = tiles.to(device, dtype)
            tiles = layout.cut(network(before(tiles) if before else tiles), len(batch))
            tiles = layout.checked(after(tiles), len(batch)).cpu() if after else tiles.cpu()
            if out is None:
                out = _new(image, tiles, image_shape)
            _check_fits(out, tiles)
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
        self._size, self._tile, self._margins, self._multiple = size, tile, margins, multiple
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

    def cut(self, output: torch.Tensor, count: int) -> torch.Tensor:
        """``output`` of ``count`` tiles without margins.

        TypeError for what is no tensor, RuntimeError for one that is no image of a tile's size, with or without
        margins, ValueError for margins that would shift what a network halves that pads.
        """
        _check_tensor("network", output)
        whole = tuple(tile + sum(margin) for tile, margin in zip(self._tile, self._margins, strict=True))
        if output.dim() != 4 or len(output) != count or tuple(output.shape[2:]) not in (self._tile, whole):
            raise RuntimeError(
                f"the network made {list(output.shape)} of {count} × {whole[0]} × {whole[1]} pixels of tiles with "
                f"margins: expected [{count}, K, {self._tile[0]}, {self._tile[1]}] or the size of its input"
                + (_lost(whole, output.shape[2:]) if output.dim() == 4 and len(output) == count else "")
            )
        if tuple(output.shape[2:]) == self._tile:
            return output
        (top, _), (left, _) = self._margins
        if top % self._multiple[0] or left % self._multiple[1]:
            raise ValueError(
                f"margins of {self._margins} begin at no multiple of {self._multiple}, and the network's output has "
                "the size of its input: it would be shifted against that of the whole image"
            )
        return output[:, :, top : top + self._tile[0], left : left + self._tile[1]]

    def checked(self, tiles: torch.Tensor, count: int) -> torch.Tensor:
        """What ``after`` made of them. TypeError for no tensor, RuntimeError for another size."""
        _check_tensor("after", tiles)
        if tiles.dim() != 4 or len(tiles) != count or tuple(tiles.shape[2:]) != self._tile:
            raise RuntimeError(
                f"after made {list(tiles.shape)} of tiles: expected [{count}, K, {self._tile[0]}, {self._tile[1]}]"
            )
        return tiles


def _lost(whole: Sequence[int], size: Sequence[int]) -> str:
    """Which margins fit a network that makes images of ``size`` of ``whole``, in words; nothing for larger ones."""
    rows, columns = (before - after for before, after in zip(whole, size, strict=True))
    if rows < 0 or columns < 0:
        return ""
    return f"; a network that always gives {rows} rows and {columns} columns less needs margins of as many in all"


def _shape_of(image: Any) -> tuple[int, int, int]:
    shape = tuple(getattr(image, "shape", ()))
    if len(shape) != 3:
        raise ValueError(f"image must be [C, H, W], got {list(shape) or type(image).__name__}")
    if 0 in shape:
        raise ValueError(f"image has no pixels: {list(shape)}")
    return shape  # type: ignore[return-value]


def _check_out(out: Any, image: Any, image_shape: tuple[int, int, int]) -> None:
    if out is None:
        return
    shape = tuple(getattr(out, "shape", ()))
    if len(shape) != 3 or shape[1:] != image_shape[1:]:
        got = list(shape) or type(out).__name__
        raise ValueError(f"out must be [K, {image_shape[1]}, {image_shape[2]}], got {got}")
    if out is image or np.may_share_memory(_in_memory(out), _in_memory(image)):
        raise ValueError("out has the memory of image, whose pixels are needed for later tiles")


#: By the size of an element: numpy does not have all of torch's.
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _in_memory(array: Any) -> np.ndarray:
    """What of the host's memory it takes."""
    if isinstance(array, np.ndarray):
        return array
    if isinstance(array, torch.Tensor) and array.device.type == "cpu" and array.element_size() in _SAME_SIZE:
        return array.detach().view(_SAME_SIZE[array.element_size()]).numpy()
    return np.empty(0)


def _check_tensor(of: str, given: Any) -> None:
    if not isinstance(given, torch.Tensor):
        raise TypeError(f"{of} must give a tensor, got {type(given).__name__}")


def _check_fits(out: Any, tiles: torch.Tensor) -> None:
    """ValueError for other channels, TypeError where ``out`` is of integers that would not be the output's values."""
    if out.shape[0] != tiles.shape[1]:
        raise ValueError(f"out has {out.shape[0]} channels, the network's output {tiles.shape[1]}")
    dtype = getattr(out, "dtype", None)
    name = str(getattr(dtype, "name", dtype)).removeprefix("torch.")
    fits = True
    if tiles.is_floating_point():
        fits = name != "bool" and "int" not in name
    elif "int" in name:
        values, limits = tiles.numpy(), np.iinfo(name)
        fits = int(values.min()) >= limits.min and int(values.max()) <= limits.max
    if not fits:
        raise TypeError(f"out of {name} does not hold the network's output, {tiles.dtype}: convert it with after")


def _margins(margin: int | tuple[int, int] | Margin) -> Margin:
    vertical, horizontal = margin if isinstance(margin, (tuple, list)) and len(margin) == 2 else (margin, margin)
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
    if block.is_complex():
        raise TypeError(f"image must be of real numbers, got {block.dtype}")
    if not block.is_floating_point():
        # Some integers can be stored and not indexed; those of more bits than 24 are no float32.
        block = block.double() if block.element_size() > 2 else block.float()
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
