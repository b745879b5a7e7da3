"""Grey pictures in files, read as stacks [sections, H, W] without losing any of them, and written as TIFF for Fiji."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpukern.runtime.files import replacing

TIFF, _PNG = (".tif", ".tiff"), (".png",)
ENDINGS = (*TIFF, *_PNG)
#: What ImageJ calls units of length, in nanometres.
_UNITS = {"nm": 1.0, "micron": 1e3, "microns": 1e3, "um": 1e3, "µm": 1e3, "μm": 1e3, r"\u00B5m": 1e3, "mm": 1e6}


class Voxel(NamedTuple):
    """Distance of sections, height and width of a pixel, in nanometres."""

    depth: float
    height: float
    width: float


def read(path: str | os.PathLike[str]) -> np.ndarray:
    """[sections, H, W] of a PNG or of all pages of a TIFF, of the file's dtype in this machine's byte order.

    Colour is taken where red, green and blue are the same everywhere, and an alpha channel that hides nothing. Where
    white is stored as 0, values are turned round, as every viewer does; colour tables of a TIFF are ignored.
    FileNotFoundError; ValueError naming the file and what is wrong with it: damage, truncation, pages that differ,
    colour, several channels.
    """
    path = _existing(path)
    if path.suffix.lower() in _PNG:
        return _grey(path, _read_png(path))[None]
    loaded = _read_tiff(path, mapped=False)
    array = _stacked(path, loaded)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def open_stack(path: str | os.PathLike[str]) -> np.ndarray:
    """As :func:`read`, but a TIFF is mapped into memory, read-only, where its pages lie in it one after another.

    For volumes larger than memory: a section is read from the disk when it is used. What is compressed is read whole,
    as is what stores white as 0. The byte order of a mapping is the file's.
    """
    path = _existing(path)
    return _stacked(path, _read_tiff(path, mapped=True)) if path.suffix.lower() in TIFF else read(path)


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"{path}: expected a file of {', '.join(ENDINGS)}")
    return path


def _read_png(path: Path) -> np.ndarray:
    """[H, W] or [H, W, channels]."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise RuntimeError("pillow is missing, of the extra train: pip install -e '.[train]'") from error
    try:
        with Image.open(path) as picture:
            if picture.mode == "RGB" and any("16" in str(tile.args) for tile in picture.tile):
                raise ValueError(f"{path}: 16-bit colour, which would be read as 8 bits: save it as grey")
            if getattr(picture, "n_frames", 1) > 1:
                raise ValueError(f"{path}: an animation of {picture.n_frames} pictures: save them as TIFF")
            return np.asarray(picture.convert("RGBA") if picture.mode == "P" else picture)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}: save it as TIFF") from error
    except (OSError, SyntaxError) as error:  # what Pillow makes of broken files
        if isinstance(error, PermissionError):
            raise
        raise ValueError(f"{path}: truncated, damaged or no PNG: {error}") from error


class _Loaded(NamedTuple):
    """The pictures of a TIFF as they are stored, what their axes are, and whether white is 0."""

    array: np.ndarray
    axes: str
    inverted: bool


def _tifffile() -> Any:
    try:
        import tifffile
    except ModuleNotFoundError as error:
        raise RuntimeError("tifffile is missing, of the extra train: pip install -e '.[train]'") from error
    return tifffile


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The ``TiffFile``. ValueError for what tifffile raises, and for what it says in its log and goes on.

    Of a truncated file it gives the pages that are left.
    """
    tifffile = _tifffile()
    complaints: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: complaints.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("tifffile")
    logger.addHandler(handler)
    try:
        with tifffile.TiffFile(path) as tiff:
            yield tiff
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # whatever it makes of foreign bytes
        if "imagecodecs" in str(error):
            raise ValueError(f"{path}: {error}: pip install imagecodecs, or save it uncompressed") from error
        raise ValueError(f"{path}: truncated, damaged or no TIFF: {error}") from error
    finally:
        logger.removeHandler(handler)
    if complaints:
        raise ValueError(f"{path}: truncated or damaged: {complaints[0]}")


def _read_tiff(path: Path, mapped: bool) -> _Loaded:
    with _opened(path) as tiff:
        kinds = [(each.shape, each.dtype) for each in tiff.series]
        if len(kinds) == 1:
            series, page = tiff.series[0], tiff.pages[0]
            if mapped and series.dataoffset is not None:
                dtype = np.dtype(tiff.byteorder + series.dtype.char)
                array: np.ndarray = np.memmap(path, dtype, "r", series.dataoffset, series.shape)
            else:
                array = series.asarray()
            return _Loaded(array, series.axes, int(page.photometric) == 0)
        if _are_pages(tiff):
            pages = np.stack([each.asarray() for each in tiff.series])
            return _Loaded(pages, "ZYX", int(tiff.pages[0].photometric) == 0)
    listed = ", ".join(f"{'×'.join(map(str, shape))} {dtype}" for shape, dtype in kinds)
    differ = "it holds several stacks" if len(set(kinds)) == 1 else "its pages differ in size or type"
    raise ValueError(f"{path}: {differ}: {listed}" if kinds else f"{path}: no pages")


def _are_pages(tiff: Any) -> bool:
    """Whether all series are grey pictures alike: tifffile makes a series of each page that it wrote by a call."""
    kinds = {(each.shape, each.dtype, each.axes, int(each.pages[0].photometric)) for each in tiff.series}
    return len(kinds) == 1 and next(iter(kinds))[2] == "YX" and not tiff.is_ome


def _stacked(path: Path, loaded: _Loaded) -> np.ndarray:
    array, axes, inverted = loaded
    if "S" in axes:
        array, axes = np.moveaxis(array, axes.index("S"), -1), axes.replace("S", "")
        array = _grey(path, array)
    if not axes.endswith("YX") or len(axes) > 3 or "C" in axes:
        shape = " × ".join(f"{length} ({letter})" for length, letter in zip(array.shape, axes, strict=True))
        raise ValueError(f"{path}: expected one stack of grey sections, got {shape}: save one channel as a stack")
    if inverted and array.dtype.kind != "f":  # of floats nobody knows what white is
        array = np.logical_not(array) if array.dtype == bool else np.iinfo(array.dtype).max - array
    return array if array.ndim == 3 else array[None]


def _grey(path: Path, array: np.ndarray) -> np.ndarray:
    """[…, H, W] of pictures [H, W], or of [..., H, W, channels] that show no colour."""
    if array.ndim == 2:
        return array
    colours, alpha = (array[..., :-1], array[..., -1:]) if array.shape[-1] in (2, 4) else (array, array[..., :0])
    full = np.iinfo(array.dtype).max if array.dtype.kind == "u" else 1
    if (alpha != full).any():
        raise ValueError(f"{path}: a picture with transparent pixels")
    if (colours != colours[..., :1]).any():
        raise ValueError(f"{path}: a picture in colour: expected grey")
    return colours[..., 0]


def read_voxel(path: str | os.PathLike[str]) -> Voxel | None:
    """The size of a voxel where a TIFF says it in the words of ImageJ; None elsewhere."""
    path = _existing(path)
    if path.suffix.lower() not in TIFF:
        return None
    with _opened(path) as tiff:
        said, tags = tiff.imagej_metadata or {}, tiff.pages[0].tags
        unit = _UNITS.get(str(said.get("unit")))
        across, down = (tags[name].value if name in tags else (0, 0) for name in ("XResolution", "YResolution"))
    if not unit or not all((*across, *down)):
        return None
    height, width = (unit * length / pixels for pixels, length in (down, across))
    return Voxel(unit * float(said.get("spacing", 0)) or width, height, width)


def save_tiff(path: str | os.PathLike[str], stack: np.ndarray, voxel: Voxel | None = None) -> None:
    """Write ``stack`` [sections, H, W] or [H, W] as a TIFF that Fiji opens with its sections as Z.

    It keeps float32, uint8 and uint16; bool becomes 0 and 255, other floats become float32, labels of other integers
    uint16. Fiji shows floats from 0 to 1, and labels up to the highest. A file that is there is replaced as a whole.

    ValueError for other shapes and dtypes, nothing to write, and labels that 16 bits do not hold; OSError where the
    file cannot be written.
    """
    tifffile = _tifffile()
    stack = _storable(np.asarray(stack))
    said: dict[str, Any] = {"axes": "ZYX"}
    if stack.dtype == np.float32:
        said |= {"min": 0.0, "max": 1.0}
    elif stack.dtype == np.uint16:
        said |= {"min": 0.0, "max": float(max(1, stack.max()))}
    resolution = None
    if voxel is not None:
        said |= {"unit": "nm", "spacing": voxel.depth}
        resolution = 1 / voxel.width, 1 / voxel.height
    with replacing(path) as draft:
        tifffile.imwrite(draft, stack, imagej=True, metadata=said, resolution=resolution)


def _storable(stack: np.ndarray) -> np.ndarray:
    """[sections, H, W] of a dtype that ImageJ has."""
    if stack.ndim not in (2, 3) or not stack.size:
        raise ValueError(f"expected a stack [sections, H, W] or a picture [H, W], got {list(stack.shape)}")
    stack = stack[None] if stack.ndim == 2 else stack
    if stack.dtype == bool:
        return stack.astype(np.uint8) * np.uint8(255)
    if stack.dtype.kind == "f":
        return stack.astype(np.float32, copy=False)
    if stack.dtype.kind not in "iu":
        raise ValueError(f"expected numbers, got {stack.dtype}")
    if stack.dtype in (np.uint8, np.uint16):
        return stack
    if stack.min() < 0 or stack.max() > 65535:
        raise ValueError(f"16 bits do not hold the labels from {stack.min()} to {stack.max()}")
    return stack.astype(np.uint16)
