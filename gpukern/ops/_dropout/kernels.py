"""Dropout kernels. A call's numbers follow from its key and offset: no mask is stored, nor read.

Operands are multiplied, not selected, so that what is dropped of an infinity or a NaN is NaN, as torch's is.
"""

import triton
import triton.language as tl

from gpukern.ops._batch_norm.functions import channel_tile, load_tile, pixel_tile, store_tile
from gpukern.ops._dropout.functions import number_at, numbers_from

#: One compiled kernel for all values, and whether the state was drawn on the GPU or not: one that was warmed up
#: outside of a CUDA graph is there when one is captured.
_ANY_VALUE = ["drawn", "key", "offset", "threshold"]


@triton.jit
def _stream(state, drawn, key, offset):
    """(key, offset): those in memory if ``drawn``."""
    there = drawn != 0
    return key + tl.load(state, mask=there, other=0), offset + tl.load(state + 1, mask=there, other=0)


@triton.jit
def _load(operand, sizes, element, inside, FLAT: tl.constexpr):
    """Load elements, by their places in the order of the result, of an Image with strides along that order."""
    place = element
    if not FLAT:
        rest = element // sizes[3]
        place = element % sizes[3] * operand.w
        place += rest % sizes[2] * operand.h
        rest = rest // sizes[2]
        place += rest % sizes[1] * operand.c + rest // sizes[1] * operand.n
    return tl.load(operand.ptr + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_ANY_VALUE)
def dropout_kernel(
    x,  # Image of four dimensions in the order of the result; only the pointer counts if FLAT
    residual,  # likewise, or nothing (its ptr None)
    y_ptr,  # dense
    state,  # int64 [2]: key and offset if drawn, else not read
    drawn: tl.int64, key: tl.int64, offset: tl.int64,  # 0 and the numbers themselves, or 1 and zeros
    sizes,  # of the four dimensions
    size,  # their product
    threshold: tl.int64, scale,
    FLAT: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """y = x · scale where the element's number is at least the threshold, else x · 0; plus the residual."""
    key, offset = _stream(state, drawn, key, offset)
    first = tl.program_id(0).to(INDEX) * BLOCK
    element = first + tl.arange(0, BLOCK)  # [BLOCK]
    inside = element < size
    kept = numbers_from(first, key, offset, BLOCK) >= tl.to_tensor(threshold).to(tl.uint32)
    y = _load(x, sizes, element, inside, FLAT) * tl.where(kept, scale, 0.0)
    if residual.ptr is not None:
        y += _load(residual, sizes, element, inside, FLAT)
    tl.store(y_ptr + element, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_ANY_VALUE)
def feature_dropout_kernel(
    x,  # Image
    residual,  # Image, or nothing (its ptr None)
    y,  # Image
    state, drawn: tl.int64, key: tl.int64, offset: tl.int64,  # as above
    sizes,  # Sizes; the rows are the images
    threshold: tl.int64, scale,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, PIXEL_ALIGN: tl.constexpr, CHANNEL_ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """The same with one number for each channel of an image. Grid: steps · channel tiles."""
    key, offset = _stream(state, drawn, key, offset)
    c, valid = channel_tile(tl.program_id(0) % sizes.channel_tiles, sizes, BLOCK_C, CHANNEL_ALIGN)
    n, h, p, inside = pixel_tile(tl.program_id(0) // sizes.channel_tiles, sizes, BLOCK_P, PIXEL_ALIGN, INDEX)
    mask = inside & valid
    number = number_at(n * (sizes.channel_groups * CHANNEL_ALIGN) + c, key, offset)
    factor = tl.where(number >= tl.to_tensor(threshold).to(tl.uint32), scale, 0.0)
    value = load_tile(x, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX) * factor
    if residual.ptr is not None:
        value += load_tile(residual, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
    store_tile(y, value, n, h, p, c, mask, PIXEL_ALIGN, CHANNEL_ALIGN, INDEX)
