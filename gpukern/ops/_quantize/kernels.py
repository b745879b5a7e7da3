"""Kernels of one pass between 16 or 32 bits and 8: a tensor in any strides is read in the order of a dense result."""

import triton
import triton.language as tl

from gpukern.ops._quantize.functions import narrowed


@triton.jit
def _load(source, sizes, element, inside, FLAT: tl.constexpr):
    """Load elements, by their places in the result, in fp32."""
    place = element
    if not FLAT:
        rest = element // sizes[3]
        place = element % sizes[3] * source.w
        place += rest % sizes[2] * source.h
        rest = rest // sizes[2]
        place += rest % sizes[1] * source.c + rest // sizes[1] * source.n
    return tl.load(source.ptr + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def quantize_kernel(
    x,  # Image of four dimensions in the order of the result; only the pointer counts if FLAT
    q_ptr,  # dense, 8 bits
    sizes,  # of the four dimensions
    size,  # their product
    inverse_scale,
    FLAT: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """q = x · inverse_scale, rounded to nearest even and saturated."""
    element = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = element < size
    q = narrowed(_load(x, sizes, element, inside, FLAT), inverse_scale, q_ptr.dtype.element_ty)
    tl.store(q_ptr + element, q, mask=inside)


@triton.jit
def dequantize_kernel(
    q,  # Image, 8 bits, as x of quantize_kernel
    x_ptr,  # dense
    sizes, size, scale,
    FLAT: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """x = q · scale in fp32, rounded once."""
    element = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = element < size
    x = _load(q, sizes, element, inside, FLAT) * scale
    tl.store(x_ptr + element, x.to(x_ptr.dtype.element_ty), mask=inside)
