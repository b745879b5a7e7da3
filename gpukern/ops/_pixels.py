"""Position of a pixel from its number in a batch of images, of a voxel from its number in a batch of volumes."""

import triton
import triton.language as tl  # noqa: F401 - the interpreter wants it beside every kernel


@triton.jit
def split_pixel(pixel, height, width):
    """Return (image, row, column) of a flat pixel number."""
    row = pixel // width
    return row // height, row % height, pixel % width


@triton.jit
def split_voxel(voxel, depth, height, width):
    """Return (volume, plane, row, column) of a flat voxel number."""
    row = voxel // width
    plane = row // height
    return plane // depth, plane % depth, row % height, voxel % width
