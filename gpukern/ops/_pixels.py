"""Where a pixel lies that is numbered through the images of a batch."""

import triton
import triton.language as tl  # noqa: F401 - the interpreter wants it beside every kernel


@triton.jit
def split_pixel(pixel, height, width):
    """(image, row, column) of a flat pixel number."""
    row = pixel // width
    return row // height, row % height, pixel % width
