"""Index arithmetic of the volume kernels: ``gpukern/conv/indexing.py`` with a third dimension of taps."""

from typing import NamedTuple

import triton
import triton.language as tl


class Filter(NamedTuple):
    """A pointer to [K, C/groups, T, R, S] and its strides, named by each dimension's role in the product."""

    ptr: object
    group: object  # from one group's filters to the next
    column: object  # along the output channels of the product
    reduction: object  # along the channels that the product sums over
    t: object
    r: object
    s: object


class Sizes(NamedTuple):
    """Sizes of a gather: source and output volumes, channels of one group."""

    batch: object
    source_d: object
    source_h: object
    source_w: object
    out_d: object
    out_h: object
    out_w: object
    groups: object
    columns: object  # channels made, per group
    reduction: object  # channels summed over, per group


@triton.jit
def inside_volume(d, h, w, sizes):
    """Whether (d, h, w), int32 tiles of one shape, lies in the source volume."""
    # Compared without sign, a negative coordinate is larger than any size: one comparison for both ends.
    d_ok = d.to(tl.uint32, bitcast=True) < tl.cast(sizes.source_d, tl.uint32)
    h_ok = h.to(tl.uint32, bitcast=True) < tl.cast(sizes.source_h, tl.uint32)
    w_ok = w.to(tl.uint32, bitcast=True) < tl.cast(sizes.source_w, tl.uint32)
    return d_ok & h_ok & w_ok


@triton.jit
def taps_inside(
    d0,  # [BLOCK_M] source plane of tap 0
    h0,
    w0,
    sizes,
    taps_d,  # taps of this phase, at most MAX_TAPS
    taps_h,
    taps_w,
    TAP_STRIDE_D: tl.constexpr,
    TAP_STRIDE_H: tl.constexpr,
    TAP_STRIDE_W: tl.constexpr,
    MAX_TAPS_D: tl.constexpr,
    MAX_TAPS_H: tl.constexpr,
    MAX_TAPS_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Return a bit mask per voxel, bit i: tap i, counted along planes and rows, lies inside the volume. [BLOCK_M, 1]"""
    bits = tl.zeros((BLOCK_M, 1), tl.int32)
    for t in tl.static_range(MAX_TAPS_D):
        for r in tl.static_range(MAX_TAPS_H):
            for s in tl.static_range(MAX_TAPS_W):
                d = d0[:, None] + t * TAP_STRIDE_D
                inside = inside_volume(d, h0[:, None] + r * TAP_STRIDE_H, w0[:, None] + s * TAP_STRIDE_W, sizes)
                inside = inside & (t < taps_d) & (r < taps_h) & (s < taps_w)
                bits = bits | (inside.to(tl.int32) << ((t * taps_h + r) * taps_w + s))
    return bits
