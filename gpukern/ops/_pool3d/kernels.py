"""3-D pooling kernels, as :mod:`gpukern.ops._pool2d.kernels` with a third dimension, adaptive maxima included.

Volumes are :class:`gpukern.ops._images.Volume`, triples (depth, height, width). Tiles are [BLOCK_CHANNELS,
BLOCK_PIXELS]; values per voxel are [1, BLOCK_PIXELS]. A *tap* is a place in a window, (t·R + r)·S + s. WINDOW bounds
the windows' sizes: the kernel's size, or in adaptive pooling the largest window's.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from gpukern.ops._pixels import split_voxel


class Sizes(NamedTuple):
    """Channels, and the sizes of the pool's input and output."""

    C: object
    D: object
    H: object
    W: object
    Z: object
    P: object
    Q: object


@triton.jit
def _at(volume, n, c, d, h, w):
    # The voxels' part is summed first, in one row, and broadcast over the channels once.
    return volume.ptr + ((n * volume.n + d * volume.d + h * volume.h + w * volume.w) + c * volume.c)


@triton.jit
def _tile(voxels, C, D, H, W, BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, INDEX: tl.constexpr):
    """(n, c, d, h, w, inside) of this program's tile of a [N, C, D, H, W] tensor with ``voxels`` = N·D·H·W."""
    # One voxel a thread, not neighbours for a wide store: that would make the loads, which are far more, strided.
    lane = tl.max_contiguous(tl.arange(0, BLOCK_PIXELS), 1)
    voxel = tl.program_id(0).to(INDEX) * BLOCK_PIXELS + lane[None, :]  # [1, BLOCK_PIXELS]
    c = tl.program_id(1).to(INDEX) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[:, None]  # [BLOCK_CHANNELS, 1]
    n, d, h, w = split_voxel(voxel, D, H, W)
    return n, c, d, h, w, (c < C) & (voxel < voxels)


# ---- one dimension of ``size`` inputs and ``outputs`` outputs --------------------------------------------------------


@triton.jit
def _window(i, size, outputs, STRIDE: tl.constexpr, PADDING: tl.constexpr, ADAPTIVE: tl.constexpr):
    """Return (begin, end): output i reads the inputs begin + t · dilation that are not negative and below end."""
    if ADAPTIVE:
        begin = i * size // outputs
        end = ((i + 1) * size + outputs - 1) // outputs
    else:
        begin = i * STRIDE - PADDING
        end = size + 0 * i
    return begin, end


@triton.jit
def _count(
    i, size, outputs,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    ADAPTIVE: tl.constexpr, INCLUDE_PAD: tl.constexpr,
):  # fmt: skip
    """Return how many inputs of output i the divisor counts."""
    begin, end = _window(i, size, outputs, STRIDE, PADDING, ADAPTIVE)
    if ADAPTIVE:
        count = end - begin
    elif INCLUDE_PAD:
        # In ceil mode a window can extend beyond the padding: that part never counts.
        count = tl.minimum(begin + WINDOW, size + PADDING) - begin
    else:
        count = tl.minimum(begin + WINDOW, size) - tl.maximum(begin, 0)
    return count


@triton.jit
def _owner(
    i, step, size, outputs,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, ADAPTIVE: tl.constexpr,
):  # fmt: skip
    """Return (output, tap, whether input i is that tap of it) of the candidate number ``step``."""
    if ADAPTIVE:
        output = i * outputs // size + step
        begin, end = _window(output, size, outputs, STRIDE, PADDING, ADAPTIVE)
        tap = i - begin
        seen = (output < outputs) & (i >= begin) & (i < end)
    else:
        output = (i + PADDING) // STRIDE - step
        # Distance from the window's corner.
        distance = i + PADDING - output * STRIDE
        tap = distance // DILATION
        seen = (output >= 0) & (output < outputs) & (distance % DILATION == 0)
        seen &= distance <= (WINDOW - 1) * DILATION
    return output, tap, seen


# ---- maximum -------------------------------------------------------------------------------------------------------


@triton.jit
def max_pool3d_kernel(
    x,  # [N, C, D, H, W]
    y,  # [N, C, Z, P, Q]
    taps,  # [N, C, Z, P, Q], unused without WITH_TAPS
    voxels,
    sizes,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, ADAPTIVE: tl.constexpr,
    WITH_TAPS: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """y = max over the window; a NaN wins, and of equal values the first."""
    n, c, z, p, q, inside = _tile(voxels, sizes.C, sizes.Z, sizes.P, sizes.Q, BLOCK_CHANNELS, BLOCK_PIXELS, INDEX)
    front, back = _window(z, sizes.D, sizes.Z, STRIDE[0], PADDING[0], ADAPTIVE)
    top, bottom = _window(p, sizes.H, sizes.P, STRIDE[1], PADDING[1], ADAPTIVE)
    left, right = _window(q, sizes.W, sizes.Q, STRIDE[2], PADDING[2], ADAPTIVE)
    # A window of only −∞ reports its first tap in the volume, which no comparison finds.
    first_t = (tl.maximum(-front, 0) + DILATION[0] - 1) // DILATION[0]
    first_r = (tl.maximum(-top, 0) + DILATION[1] - 1) // DILATION[1]
    first_s = (tl.maximum(-left, 0) + DILATION[2] - 1) // DILATION[2]
    first = (first_t * WINDOW[1] + first_r) * WINDOW[2] + first_s
    best_tap = tl.broadcast_to(first, (BLOCK_CHANNELS, BLOCK_PIXELS)).to(tl.int32)
    best = tl.full((BLOCK_CHANNELS, BLOCK_PIXELS), float("-inf"), tl.float32)
    for tap in tl.range(0, WINDOW[0] * WINDOW[1] * WINDOW[2], loop_unroll_factor=UNROLL):
        d = front + tap // (WINDOW[1] * WINDOW[2]) * DILATION[0]
        h = top + tap // WINDOW[2] % WINDOW[1] * DILATION[1]
        w = left + tap % WINDOW[2] * DILATION[2]
        valid = inside & (d >= 0) & (d < back) & (h >= 0) & (h < bottom) & (w >= 0) & (w < right)
        value = tl.load(_at(x, n, c, d, h, w), mask=valid, other=float("-inf")).to(tl.float32)
        better = (value > best) | (value != value)
        best = tl.where(better, value, best)
        best_tap = tl.where(better, tap, best_tap)
    tl.store(_at(y, n, c, z, p, q), best.to(y.ptr.dtype.element_ty), mask=inside)
    if WITH_TAPS:
        tl.store(_at(taps, n, c, z, p, q), best_tap.to(taps.ptr.dtype.element_ty), mask=inside)


@triton.jit
def max_pool3d_backward_kernel(
    grad,  # [N, C, Z, P, Q]
    taps,  # [N, C, Z, P, Q]
    out,  # [N, C, D, H, W]
    voxels,
    sizes,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, ADAPTIVE: tl.constexpr,
    OWNERS: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Each voxel adds up the gradients of the windows whose tap points at it."""
    n, c, d, h, w, inside = _tile(voxels, sizes.C, sizes.D, sizes.H, sizes.W, BLOCK_CHANNELS, BLOCK_PIXELS, INDEX)
    total = tl.zeros((BLOCK_CHANNELS, BLOCK_PIXELS), tl.float32)
    for i in tl.range(0, OWNERS[0] * OWNERS[1] * OWNERS[2], loop_unroll_factor=UNROLL):
        step = i // (OWNERS[1] * OWNERS[2])
        z, t, seen = _owner(d, step, sizes.D, sizes.Z, WINDOW[0], STRIDE[0], PADDING[0], DILATION[0], ADAPTIVE)
        step = i // OWNERS[2] % OWNERS[1]
        p, r, seen_p = _owner(h, step, sizes.H, sizes.P, WINDOW[1], STRIDE[1], PADDING[1], DILATION[1], ADAPTIVE)
        step = i % OWNERS[2]
        q, s, seen_q = _owner(w, step, sizes.W, sizes.Q, WINDOW[2], STRIDE[2], PADDING[2], DILATION[2], ADAPTIVE)
        valid = inside & seen & seen_p & seen_q
        tap = (t * WINDOW[1] + r) * WINDOW[2] + s
        winner = tl.load(_at(taps, n, c, z, p, q), mask=valid, other=0).to(tl.int32)
        # Loaded whichever tap won: waiting for the tap first would serialize two memory latencies.
        value = tl.load(_at(grad, n, c, z, p, q), mask=valid, other=0.0).to(tl.float32)
        total += tl.where(valid & (winner == tap), value, 0.0)
    tl.store(_at(out, n, c, d, h, w), total.to(out.ptr.dtype.element_ty), mask=inside)


@triton.jit
def _tap_place(
    taps, n, c, z, p, q, inside, sizes,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, ADAPTIVE: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """(d, h, w) of the voxels that the taps of outputs (n, c, z, p, q) point at."""
    tap = tl.load(_at(taps, n, c, z, p, q), mask=inside, other=0).to(INDEX)
    front, _ = _window(z, sizes.D, sizes.Z, STRIDE[0], PADDING[0], ADAPTIVE)
    top, _ = _window(p, sizes.H, sizes.P, STRIDE[1], PADDING[1], ADAPTIVE)
    left, _ = _window(q, sizes.W, sizes.Q, STRIDE[2], PADDING[2], ADAPTIVE)
    d = front + tap // (WINDOW[1] * WINDOW[2]) * DILATION[0]
    h = top + tap // WINDOW[2] % WINDOW[1] * DILATION[1]
    w = left + tap % WINDOW[2] * DILATION[2]
    return d, h, w


@triton.jit
def max_pool3d_indices_kernel(
    taps,  # [N, C, Z, P, Q]
    indices,  # [N, C, Z, P, Q], int64
    voxels,
    sizes,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, ADAPTIVE: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Write torch's flat indices (d·H + h)·W + w."""
    n, c, z, p, q, inside = _tile(voxels, sizes.C, sizes.Z, sizes.P, sizes.Q, BLOCK_CHANNELS, BLOCK_PIXELS, INDEX)
    d, h, w = _tap_place(taps, n, c, z, p, q, inside, sizes, WINDOW, STRIDE, PADDING, DILATION, ADAPTIVE, INDEX)
    index = (d.to(tl.int64) * sizes.H + h) * sizes.W + w
    tl.store(_at(indices, n, c, z, p, q), index, mask=inside)


@triton.jit
def max_pool3d_gather_kernel(
    image,  # [N, C, D, H, W]
    taps,  # [N, C, Z, P, Q]
    out,  # [N, C, Z, P, Q]
    voxels,
    sizes,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, ADAPTIVE: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """out = image at the places of the taps."""
    n, c, z, p, q, inside = _tile(voxels, sizes.C, sizes.Z, sizes.P, sizes.Q, BLOCK_CHANNELS, BLOCK_PIXELS, INDEX)
    d, h, w = _tap_place(taps, n, c, z, p, q, inside, sizes, WINDOW, STRIDE, PADDING, DILATION, ADAPTIVE, INDEX)
    # A dilated window in the padding can have no tap in the volume at all.
    valid = inside & (d < sizes.D) & (h < sizes.H) & (w < sizes.W)
    value = tl.load(_at(image, n, c, d, h, w), mask=valid, other=0.0)
    tl.store(_at(out, n, c, z, p, q), value, mask=inside)


# ---- average -------------------------------------------------------------------------------------------------------


@triton.jit
def avg_pool3d_kernel(
    x,  # [N, C, D, H, W]
    y,  # [N, C, Z, P, Q]
    voxels,
    sizes,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, ADAPTIVE: tl.constexpr,
    INCLUDE_PAD: tl.constexpr, DIVISOR: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """y = Σ window / divisor, a thread for each output. DIVISOR 0 means the count."""
    n, c, z, p, q, inside = _tile(voxels, sizes.C, sizes.Z, sizes.P, sizes.Q, BLOCK_CHANNELS, BLOCK_PIXELS, INDEX)
    front, back = _window(z, sizes.D, sizes.Z, STRIDE[0], PADDING[0], ADAPTIVE)
    top, bottom = _window(p, sizes.H, sizes.P, STRIDE[1], PADDING[1], ADAPTIVE)
    left, right = _window(q, sizes.W, sizes.Q, STRIDE[2], PADDING[2], ADAPTIVE)
    total = tl.zeros((BLOCK_CHANNELS, BLOCK_PIXELS), tl.float32)
    for i in tl.range(0, WINDOW[0] * WINDOW[1] * WINDOW[2], loop_unroll_factor=UNROLL):
        d = front + i // (WINDOW[1] * WINDOW[2])
        h = top + i // WINDOW[2] % WINDOW[1]
        w = left + i % WINDOW[2]
        valid = inside & (d >= 0) & (d < back) & (h >= 0) & (h < bottom) & (w >= 0) & (w < right)
        total += tl.load(_at(x, n, c, d, h, w), mask=valid, other=0.0).to(tl.float32)
    count = _counted(z, p, q, sizes, WINDOW, STRIDE, PADDING, ADAPTIVE, INCLUDE_PAD, DIVISOR)
    mean = tl.div_rn(total, tl.broadcast_to(count, total.shape))
    tl.store(_at(y, n, c, z, p, q), mean.to(y.ptr.dtype.element_ty), mask=inside)


@triton.jit
def avg_pool3d_backward_kernel(
    grad,  # [N, C, Z, P, Q]
    out,  # [N, C, D, H, W]
    voxels,
    sizes,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, ADAPTIVE: tl.constexpr,
    INCLUDE_PAD: tl.constexpr, DIVISOR: tl.constexpr, OWNERS: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Each voxel adds up gradient / divisor of the windows that contain it. OWNERS bounds their number."""
    n, c, d, h, w, inside = _tile(voxels, sizes.C, sizes.D, sizes.H, sizes.W, BLOCK_CHANNELS, BLOCK_PIXELS, INDEX)
    total = tl.zeros((BLOCK_CHANNELS, BLOCK_PIXELS), tl.float32)
    for i in tl.range(0, OWNERS[0] * OWNERS[1] * OWNERS[2], loop_unroll_factor=UNROLL):
        step = i // (OWNERS[1] * OWNERS[2])
        z, _, seen = _owner(d, step, sizes.D, sizes.Z, WINDOW[0], STRIDE[0], PADDING[0], 1, ADAPTIVE)
        step = i // OWNERS[2] % OWNERS[1]
        p, _, seen_p = _owner(h, step, sizes.H, sizes.P, WINDOW[1], STRIDE[1], PADDING[1], 1, ADAPTIVE)
        step = i % OWNERS[2]
        q, _, seen_q = _owner(w, step, sizes.W, sizes.Q, WINDOW[2], STRIDE[2], PADDING[2], 1, ADAPTIVE)
        valid = inside & seen & seen_p & seen_q
        value = tl.load(_at(grad, n, c, z, p, q), mask=valid, other=0.0).to(tl.float32)
        if DIVISOR == 0:
            count = _counted(z, p, q, sizes, WINDOW, STRIDE, PADDING, ADAPTIVE, INCLUDE_PAD, DIVISOR)
            # Windows that there are not may count nothing, and their 0 / 0 must not reach the sum.
            value = tl.div_rn(value, tl.broadcast_to(tl.where(count > 0, count, 1.0), value.shape))
        total += value
    if DIVISOR != 0:
        total = tl.div_rn(total, tl.full(total.shape, DIVISOR, tl.float32))
    tl.store(_at(out, n, c, d, h, w), total.to(out.ptr.dtype.element_ty), mask=inside)


@triton.jit
def _counted(
    z, p, q, sizes,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, ADAPTIVE: tl.constexpr,
    INCLUDE_PAD: tl.constexpr, DIVISOR: tl.constexpr,
):  # fmt: skip
    """Return the divisor of outputs in fp32, for a division that is correctly rounded, which Triton's ``/`` is not."""
    if DIVISOR == 0:
        planes = _count(z, sizes.D, sizes.Z, WINDOW[0], STRIDE[0], PADDING[0], ADAPTIVE, INCLUDE_PAD)
        rows = _count(p, sizes.H, sizes.P, WINDOW[1], STRIDE[1], PADDING[1], ADAPTIVE, INCLUDE_PAD)
        columns = _count(q, sizes.W, sizes.Q, WINDOW[2], STRIDE[2], PADDING[2], ADAPTIVE, INCLUDE_PAD)
        count = (planes * rows * columns).to(tl.float32)
    else:
        count = tl.full((1, 1), DIVISOR, tl.float32)
    return count
