"""The kernel of the input pipeline: bytes are read once, each from where its crop has it, and results written once."""

from typing import NamedTuple

import triton
import triton.language as tl

from gpukern.ops._dropout.functions import four_numbers


class Crop(NamedTuple):
    """Sizes of the images, and the crops: rows and columns of the first pixel of the first one, and how many more."""

    images: object
    height: object
    width: object
    top: object
    left: object
    tops: object
    lefts: object


@triton.jit
def _choose(number, choices):
    """Return (one of so many choices by 32 random bits, 32 bits that are left for another choice)."""
    product = tl.to_tensor(number).to(tl.uint64) * tl.to_tensor(choices).to(tl.uint64)
    return (product >> 32).to(tl.int32), product.to(tl.uint32)


@triton.jit
def _within(place, size):
    """Whether 0 ≤ place < size, in one comparison: what is negative is large without its sign."""
    return place.to(tl.uint32) < tl.to_tensor(size).to(tl.uint32)


@triton.jit
def _inside(place, size, PADDING: tl.constexpr):
    """Return the pixel of the image that is seen at a ``place`` along a side of it, perhaps outside."""
    if PADDING == "reflect":
        place = tl.where(place < 0, -place, place)
        place = tl.where(place >= size, 2 * (size - 1) - place, place)
    elif PADDING == "symmetric":
        place = tl.where(place < 0, -1 - place, place)
        place = tl.where(place >= size, 2 * size - 1 - place, place)
    elif PADDING != "none":
        place = tl.minimum(tl.maximum(place, 0), size - 1)
    return place


@triton.jit
def _pixel(element, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    """Return (row, column, channel) of an element, int32.

    Divided without signs, which takes fewer instructions, and once by each size.
    """
    if element.dtype == tl.int32:
        element = element.to(tl.uint32)
    row = element // (WIDTH * CHANNELS)
    rest = (element - row * (WIDTH * CHANNELS)).to(tl.uint32)
    column = rest // CHANNELS
    return row.to(tl.int32), column.to(tl.int32), (rest - column * CHANNELS).to(tl.int32)


# One compiled kernel for all seeds and steps, and for every probability of a flip.
@triton.jit(do_not_specialize=["key", "offset", "flip"])
def augment_kernel(
    images,  # Image of uint8
    index_ptr,  # of the image of each sample, or None: the first ones
    places_ptr,  # whose random numbers a sample gets, or None: its image's
    mean_ptr, mean_stride,  # fp32 [C] with its stride, 0 for one number of all channels; or dense [H, W, C]
    scale_ptr, scale_stride,  # fp32 [C] likewise
    y_ptr,  # dense, [samples, HEIGHT, WIDTH, CHANNELS]
    crop,  # Crop
    fill,  # the value of what lies outside
    key: tl.int64, offset: tl.int64,
    flip: tl.int64,  # of 2³² numbers, those that flip
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,  # of the result
    RANDOM: tl.constexpr, CUTOUT: tl.constexpr, PADDING: tl.constexpr, MEAN_IMAGE: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """y = (x − mean) · scale, x being a crop, perhaps flipped; 0 in a square of CUTOUT pixels.

    WHOLE: a sample is an image as it lies in memory. Grid: samples · blocks of a sample.
    """
    SIZE: tl.constexpr = HEIGHT * WIDTH * CHANNELS
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    if SIZE + BLOCK > 2**31:
        block = block.to(tl.int64)
    element = block * BLOCK + tl.arange(0, BLOCK)
    mask = element < SIZE
    row, column, channel = _pixel(element, WIDTH, CHANNELS)
    source = sample
    if index_ptr is not None:
        source = tl.load(index_ptr + sample).to(tl.int64)
    known = (source >= 0) & (source < crop.images)

    start = images.ptr + source * images.n
    outside = element < 0
    cut = outside
    if WHOLE:
        from_mean = element
        value = tl.load(start + element, mask=mask & known, other=0).to(tl.float32)
    else:
        top, left, across = crop.top, crop.left, column
        if RANDOM:
            place = source
            if places_ptr is not None:
                place = tl.load(places_ptr + sample).to(tl.int64)
            by_row, by_column, by_flip, by_cutout = four_numbers(place, key, offset)
            top += _choose(by_row, crop.tops)[0]
            left += _choose(by_column, crop.lefts)[0]
            across = tl.where(by_flip.to(tl.int64) < flip, WIDTH - 1 - column, column)
            if CUTOUT > 0:
                cut_row, rest = _choose(by_cutout, HEIGHT)
                cut_column, rest = _choose(rest, WIDTH)
                cut = _within(row - (cut_row - CUTOUT // 2), CUTOUT)
                cut &= _within(column - (cut_column - CUTOUT // 2), CUTOUT)
        h, w = top + row, left + across
        seen = mask & known
        if PADDING == "constant":
            inside = _within(h, crop.height) & _within(w, crop.width)
            outside = inside == 0
            seen &= inside
        if PADDING != "constant" or MEAN_IMAGE:  # else nothing is loaded from there
            h, w = _inside(h, crop.height, PADDING), _inside(w, crop.width, PADDING)
        h, w = h.to(INDEX), w.to(INDEX)
        from_mean = (h * crop.width + w) * CHANNELS + channel
        at = h * images.h + w * images.w + channel * images.c
        value = tl.load(start + at, mask=seen & (cut == 0), other=0).to(tl.float32)

    value = tl.where(outside, fill, value)
    if MEAN_IMAGE:
        value -= tl.load(mean_ptr + from_mean, mask=mask, other=0.0)
    else:
        value -= tl.load(mean_ptr + channel * mean_stride)
    value *= tl.load(scale_ptr + channel * scale_stride)
    value = tl.where(known, tl.where(cut, 0.0, value), float("nan"))
    tl.store(y_ptr + sample * SIZE + element, value.to(y_ptr.dtype.element_ty), mask=mask)
