"""Index arithmetic shared by the convolution kernels: which source pixel belongs to which tap.

The forward convolution and its input gradient are one gather. For an output pixel and a tap j of a list of taps,

    source row = output row · ROW_STRIDE + base + j · TAP_STRIDE,      filter row = first + j · TAP_STEP

- forward: every filter row is a tap; ``ROW_STRIDE = stride, base = −top, TAP_STRIDE = dilation``;
- input gradient (TRANSPOSED): the pixels of dx whose row is ``phase`` modulo the stride meet the same filter rows,
  those with ``(phase + top − r · dilation) % stride == 0``. They lie ``TAP_STEP = stride / gcd(stride, dilation)``
  apart, and in units of rows of dy one step is ``−TAP_STEP · dilation / stride``. Each phase is a convolution of
  stride 1, and no tap is multiplied by zeros. See Dumoulin and Visin, "A guide to convolution arithmetic for deep
  learning", 2016, chapter 4.

The same holds for columns. All sizes and strides are in elements.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Filter(NamedTuple):
    """A pointer to [K, C/groups, R, S] and its strides, named by each dimension's role in the product."""

    ptr: object
    group: object  # from one group's filters to the next
    column: object  # along the output channels of the product
    reduction: object  # along the channels that the product sums over
    r: object
    s: object


class Sizes(NamedTuple):
    """Sizes of a gather: source and output images, channels of one group."""

    batch: object
    source_h: object
    source_w: object
    out_h: object
    out_w: object
    groups: object
    columns: object  # channels made, per group
    reduction: object  # channels summed over, per group


@triton.jit
def tile_order(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """Return (pid_m, pid_n) such that GROUP_M row tiles share their column tiles while those are in the L2 cache."""
    width = GROUP_M * num_n
    group = pid // width
    rows = min(num_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + (pid % width) % rows, (pid % width) // rows


@triton.jit
def phase_taps(
    phase, padding, TAPS: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, TAP_STEP: tl.constexpr
):
    """Return (first filter row, number of taps, base source row) of the rows of dx that are ``phase`` modulo STRIDE."""
    first = TAPS  # no tap
    for r in tl.static_range(TAP_STEP):
        # At most one of TAP_STEP neighbouring rows fits the phase.
        if r < TAPS:
            first = tl.where((phase + padding - r * DILATION) % STRIDE == 0, r, first)
    count = (TAPS - first + TAP_STEP - 1) // TAP_STEP
    # Exact if there is a tap, unused if there is none.
    base = (phase + padding - first * DILATION) // STRIDE
    return first, count, base


@triton.jit
def inside_image(h, w, sizes):
    """Whether (h, w), int32 tiles of one shape, lies in the source image."""
    # Compared without sign, a negative coordinate is larger than any size: one comparison for both ends.
    # A size of 1 is compiled in as a plain number: cast() takes both.
    h_ok = h.to(tl.uint32, bitcast=True) < tl.cast(sizes.source_h, tl.uint32)
    w_ok = w.to(tl.uint32, bitcast=True) < tl.cast(sizes.source_w, tl.uint32)
    return h_ok & w_ok


@triton.jit
def taps_inside(
    h0,  # [BLOCK_M] source row of tap 0
    w0,
    sizes,
    taps_h,  # taps of this phase, at most MAX_TAPS_H
    taps_w,
    TAP_STRIDE_H: tl.constexpr,
    TAP_STRIDE_W: tl.constexpr,
    MAX_TAPS_H: tl.constexpr,
    MAX_TAPS_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Return a bit mask per pixel, bit t: tap t, counted along rows, lies inside the image. [BLOCK_M, 1]"""
    bits = tl.zeros((BLOCK_M, 1), tl.int32)
    for r in tl.static_range(MAX_TAPS_H):
        for s in tl.static_range(MAX_TAPS_W):
            inside = inside_image(h0[:, None] + r * TAP_STRIDE_H, w0[:, None] + s * TAP_STRIDE_W, sizes)
            inside = inside & (r < taps_h) & (s < taps_w)
            bits = bits | (inside.to(tl.int32) << (r * taps_w + s))
    return bits
