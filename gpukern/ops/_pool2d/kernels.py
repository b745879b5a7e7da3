"""Pooling kernels. Images are :class:`gpukern.ops._images.Image`: a pointer and the strides of [N, C, H, W].

Tiles are [BLOCK_CHANNELS, BLOCK_PIXELS]; values per pixel are [1, BLOCK_PIXELS]. Pixels are counted through the whole
batch. Backward kernels gather: each input pixel reads the windows that contain it, in a fixed order, so there are no
atomics and results are deterministic.

A *tap* is a place in a window, r·S + s. The forward of a maximum saves the tap that won, a byte for common windows.
"""

import triton
import triton.language as tl

from gpukern.ops._quantize.functions import narrowed


@triton.jit
def _at(image, n, c, h, w):
    # The pixels' part is summed first, in one row, and broadcast over the channels once.
    return image.ptr + ((n * image.n + h * image.h + w * image.w) + c * image.c)


@triton.jit
def _tile(pixels, C, H, W, BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, INDEX: tl.constexpr):
    """(n, c, h, w, inside) of this program's tile of a [N, C, H, W] tensor with ``pixels`` = N·H·W."""
    # One pixel a thread, not neighbours for a wide store: that would make the loads, which are far more, strided.
    lane = tl.max_contiguous(tl.arange(0, BLOCK_PIXELS), 1)
    pixel = tl.program_id(0).to(INDEX) * BLOCK_PIXELS + lane[None, :]  # [1, BLOCK_PIXELS]
    c = tl.program_id(1).to(INDEX) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[:, None]  # [BLOCK_CHANNELS, 1]
    row = pixel // W
    return row // H, c, row % H, pixel % W, (c < C) & (pixel < pixels)


# ---- maximum -------------------------------------------------------------------------------------------------------


@triton.jit
def max_pool2d_kernel(
    x,  # [N, C, H, W]
    y,  # [N, C, P, Q]
    taps,  # [N, C, P, Q], unused without WITH_TAPS
    pixels, C, H, W, P, Q,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    WITH_TAPS: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """y = max over the window; a NaN wins, and of equal values the first."""
    n, c, p, q, inside = _tile(pixels, C, P, Q, BLOCK_CHANNELS, BLOCK_PIXELS, INDEX)
    top = p * STRIDE[0] - PADDING[0]
    left = q * STRIDE[1] - PADDING[1]
    # A window of only −∞ reports its first tap in the image, which no comparison finds.
    first_r = (tl.maximum(-top, 0) + DILATION[0] - 1) // DILATION[0]
    first_s = (tl.maximum(-left, 0) + DILATION[1] - 1) // DILATION[1]
    best_tap = tl.broadcast_to(first_r * KERNEL[1] + first_s, (BLOCK_CHANNELS, BLOCK_PIXELS)).to(tl.int32)
    best = tl.full((BLOCK_CHANNELS, BLOCK_PIXELS), float("-inf"), tl.float32)
    for tap in tl.range(0, KERNEL[0] * KERNEL[1], loop_unroll_factor=UNROLL):
        h = top + tap // KERNEL[1] * DILATION[0]
        w = left + tap % KERNEL[1] * DILATION[1]
        valid = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        value = tl.load(_at(x, n, c, h, w), mask=valid, other=float("-inf")).to(tl.float32)
        better = (value > best) | (value != value)
        best = tl.where(better, value, best)
        best_tap = tl.where(better, tap, best_tap)
    tl.store(_at(y, n, c, p, q), best.to(y.ptr.dtype.element_ty), mask=inside)
    if WITH_TAPS:
        tl.store(_at(taps, n, c, p, q), best_tap.to(taps.ptr.dtype.element_ty), mask=inside)


@triton.jit
def max_pool2d_quantized_kernel(
    x,  # [N, C, H, W], 8 bits
    y,  # [N, C, P, Q]
    pixels, C, H, W, P, Q,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """As max_pool2d_kernel without taps. A window without pixels gives the lowest value, −127 or −448."""
    # Compared as they are or as halves: a conversion of each byte to fp32 would take longer than to read it.
    IS_INTEGER: tl.constexpr = x.ptr.dtype.element_ty == tl.int8
    DTYPE: tl.constexpr = tl.int8 if IS_INTEGER else tl.float16
    LOWEST: tl.constexpr = -127 if IS_INTEGER else -448.0
    n, c, p, q, inside = _tile(pixels, C, P, Q, BLOCK_CHANNELS, BLOCK_PIXELS, INDEX)
    top = p * STRIDE[0] - PADDING[0]
    left = q * STRIDE[1] - PADDING[1]
    best = tl.full((BLOCK_CHANNELS, BLOCK_PIXELS), LOWEST, DTYPE)
    for tap in tl.range(0, KERNEL[0] * KERNEL[1], loop_unroll_factor=UNROLL):
        h = top + tap // KERNEL[1] * DILATION[0]
        w = left + tap % KERNEL[1] * DILATION[1]
        valid = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        value = tl.load(_at(x, n, c, h, w), mask=valid, other=LOWEST).to(DTYPE)
        best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
    tl.store(_at(y, n, c, p, q), best.to(y.ptr.dtype.element_ty), mask=inside)


@triton.jit
def max_pool2d_backward_kernel(
    grad,  # [N, C, P, Q]
    taps,  # [N, C, P, Q]
    out,  # [N, C, H, W]
    pixels, C, H, W, P, Q,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    OWNERS: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Each input pixel adds up the gradients of the windows whose tap points at it."""
    n, c, h, w, inside = _tile(pixels, C, H, W, BLOCK_CHANNELS, BLOCK_PIXELS, INDEX)
    last_p = (h + PADDING[0]) // STRIDE[0]
    last_q = (w + PADDING[1]) // STRIDE[1]
    total = tl.zeros((BLOCK_CHANNELS, BLOCK_PIXELS), tl.float32)
    for i in tl.range(0, OWNERS[0] * OWNERS[1], loop_unroll_factor=UNROLL):
        p = last_p - i // OWNERS[1]
        q = last_q - i % OWNERS[1]
        # Distance of the pixel from the window's corner: r·dilation and s·dilation if the window contains it.
        down = h + PADDING[0] - p * STRIDE[0]
        across = w + PADDING[1] - q * STRIDE[1]
        seen = (p >= 0) & (p < P) & (down % DILATION[0] == 0) & (down <= (KERNEL[0] - 1) * DILATION[0])
        seen &= (q >= 0) & (q < Q) & (across % DILATION[1] == 0) & (across <= (KERNEL[1] - 1) * DILATION[1])
        tap = down // DILATION[0] * KERNEL[1] + across // DILATION[1]
        valid = inside & seen
        winner = tl.load(_at(taps, n, c, p, q), mask=valid, other=0).to(tl.int32)
        # Loaded whichever tap won: waiting for the tap first would serialize two memory latencies.
        value = tl.load(_at(grad, n, c, p, q), mask=valid, other=0.0).to(tl.float32)
        total += tl.where(valid & (winner == tap), value, 0.0)
    tl.store(_at(out, n, c, h, w), total.to(out.ptr.dtype.element_ty), mask=inside)


@triton.jit
def _tap_place(
    taps, n, c, p, q, inside,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """(h, w) of the input pixels that the taps of outputs (n, c, p, q) point at."""
    tap = tl.load(_at(taps, n, c, p, q), mask=inside, other=0).to(INDEX)
    h = p * STRIDE[0] - PADDING[0] + tap // KERNEL[1] * DILATION[0]
    w = q * STRIDE[1] - PADDING[1] + tap % KERNEL[1] * DILATION[1]
    return h, w


@triton.jit
def max_pool2d_indices_kernel(
    taps,  # [N, C, P, Q]
    indices,  # [N, C, P, Q], int64
    pixels, C, W, P, Q,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Write torch's flat indices h·W + w."""
    n, c, p, q, inside = _tile(pixels, C, P, Q, BLOCK_CHANNELS, BLOCK_PIXELS, INDEX)
    h, w = _tap_place(taps, n, c, p, q, inside, KERNEL, STRIDE, PADDING, DILATION, INDEX)
    tl.store(_at(indices, n, c, p, q), h.to(tl.int64) * W + w, mask=inside)


@triton.jit
def max_pool2d_gather_kernel(
    image,  # [N, C, H, W]
    taps,  # [N, C, P, Q]
    out,  # [N, C, P, Q]
    pixels, C, H, W, P, Q,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """out = image at the places of the taps."""
    n, c, p, q, inside = _tile(pixels, C, P, Q, BLOCK_CHANNELS, BLOCK_PIXELS, INDEX)
    h, w = _tap_place(taps, n, c, p, q, inside, KERNEL, STRIDE, PADDING, DILATION, INDEX)
    # A dilated window in the padding can have no tap in the image at all.
    valid = inside & (h < H) & (w < W)
    value = tl.load(_at(image, n, c, h, w), mask=valid, other=0.0)
    tl.store(_at(out, n, c, p, q), value, mask=inside)


# ---- average, fixed windows and adaptive ones ----------------------------------------------------------------------
#
# One dimension at a time: one with ``size`` inputs and ``outputs`` outputs.


@triton.jit
def _window(
    i, size, outputs,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    ADAPTIVE: tl.constexpr, INCLUDE_PAD: tl.constexpr,
):  # fmt: skip
    """Return (begin, end, count): output i reads the inputs begin … end − 1; the divisor counts ``count`` of them."""
    if ADAPTIVE:
        begin = i * size // outputs
        end = ((i + 1) * size + outputs - 1) // outputs
        count = end - begin
    else:
        start = i * STRIDE - PADDING
        begin = tl.maximum(start, 0)
        end = tl.minimum(start + KERNEL, size)
        # In ceil mode a window can extend beyond the padding: that part never counts.
        count = tl.minimum(start + KERNEL, size + PADDING) - start if INCLUDE_PAD else end - begin
    return begin, end, count


@triton.jit
def _owners(
    i, size, outputs, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, ADAPTIVE: tl.constexpr
):
    """Return (begin, end): the outputs begin … end − 1 whose windows contain input i."""
    if ADAPTIVE:
        begin = i * outputs // size
        end = ((i + 1) * outputs + size - 1) // size
    else:
        begin = tl.maximum(i + PADDING - KERNEL + STRIDE, 0) // STRIDE
        end = tl.minimum((i + PADDING) // STRIDE + 1, outputs)
    return begin, end


@triton.jit
def avg_pool2d_kernel(
    x,  # [N, C, H, W]
    y,  # [N, C, P, Q]
    pixels, C, H, W, P, Q,
    scales,  # Scales, or None
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, ADAPTIVE: tl.constexpr,
    INCLUDE_PAD: tl.constexpr, DIVISOR: tl.constexpr, WINDOW: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """y = Σ window / divisor, a thread for each output. WINDOW bounds the windows' size; DIVISOR 0 means the count."""
    n, c, p, q, inside = _tile(pixels, C, P, Q, BLOCK_CHANNELS, BLOCK_PIXELS, INDEX)
    top, bottom, rows = _window(p, H, P, KERNEL[0], STRIDE[0], PADDING[0], ADAPTIVE, INCLUDE_PAD)
    left, right, columns = _window(q, W, Q, KERNEL[1], STRIDE[1], PADDING[1], ADAPTIVE, INCLUDE_PAD)
    total = _zeros(x, BLOCK_CHANNELS, BLOCK_PIXELS)
    for i in tl.range(0, WINDOW[0] * WINDOW[1], loop_unroll_factor=UNROLL):
        h = top + i // WINDOW[1]
        w = left + i % WINDOW[1]
        total += tl.load(_at(x, n, c, h, w), mask=inside & (h < bottom) & (w < right), other=0.0).to(total.dtype)
    mean = _mean(total, rows * columns, scales, y.ptr.dtype.element_ty, DIVISOR)
    tl.store(_at(y, n, c, p, q), mean, mask=inside)


@triton.jit
def avg_pool2d_whole_window_kernel(
    x,  # [N, C, H, W]
    y,  # [N, C, P, Q]
    C, H, W, P, Q,
    scales,  # Scales, or None
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, ADAPTIVE: tl.constexpr,
    INCLUDE_PAD: tl.constexpr, DIVISOR: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """y = Σ window / divisor, a program for each window (of BLOCK_CHANNELS channels), which it reads together."""
    pixel = tl.program_id(0).to(INDEX)
    n, p, q = pixel // Q // P, pixel // Q % P, pixel % Q
    c = tl.program_id(1).to(INDEX) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[:, None]  # [BLOCK_CHANNELS, 1]
    top, bottom, rows = _window(p, H, P, KERNEL[0], STRIDE[0], PADDING[0], ADAPTIVE, INCLUDE_PAD)
    left, right, columns = _window(q, W, Q, KERNEL[1], STRIDE[1], PADDING[1], ADAPTIVE, INCLUDE_PAD)
    width = right - left
    area = (bottom - top) * width
    total = _zeros(x, BLOCK_CHANNELS, BLOCK_PIXELS)
    for start in range(0, area, BLOCK_PIXELS):
        i = start + tl.arange(0, BLOCK_PIXELS)[None, :]  # [1, BLOCK_PIXELS]
        address = _at(x, n, c, top + i // width, left + i % width)
        total += tl.load(address, mask=(c < C) & (i < area), other=0.0).to(total.dtype)
    total = tl.sum(total, 1)[:, None]  # [BLOCK_CHANNELS, 1]
    mean = _mean(total, rows * columns, scales, y.ptr.dtype.element_ty, DIVISOR)
    tl.store(_at(y, n, c, p, q), mean, mask=c < C)


@triton.jit
def avg_pool2d_backward_kernel(
    grad,  # [N, C, P, Q]
    out,  # [N, C, H, W]
    pixels, C, H, W, P, Q,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, ADAPTIVE: tl.constexpr,
    INCLUDE_PAD: tl.constexpr, DIVISOR: tl.constexpr, OWNERS: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Each input pixel adds up gradient / divisor of the windows that contain it. OWNERS bounds their number."""
    n, c, h, w, inside = _tile(pixels, C, H, W, BLOCK_CHANNELS, BLOCK_PIXELS, INDEX)
    top, bottom = _owners(h, H, P, KERNEL[0], STRIDE[0], PADDING[0], ADAPTIVE)
    left, right = _owners(w, W, Q, KERNEL[1], STRIDE[1], PADDING[1], ADAPTIVE)
    total = tl.zeros((BLOCK_CHANNELS, BLOCK_PIXELS), tl.float32)
    for i in tl.range(0, OWNERS[0] * OWNERS[1], loop_unroll_factor=UNROLL):
        p = top + i // OWNERS[1]
        q = left + i % OWNERS[1]
        value = tl.load(_at(grad, n, c, p, q), mask=inside & (p < bottom) & (q < right), other=0.0).to(tl.float32)
        if DIVISOR == 0:
            _, _, rows = _window(p, H, P, KERNEL[0], STRIDE[0], PADDING[0], ADAPTIVE, INCLUDE_PAD)
            _, _, columns = _window(q, W, Q, KERNEL[1], STRIDE[1], PADDING[1], ADAPTIVE, INCLUDE_PAD)
            # Positions past the last window have a count of zero, and their 0 / 0 must not reach the sum.
            value = _divide(value, tl.maximum(rows * columns, 1), 0)
        total += value
    if DIVISOR != 0:
        total = _divide(total, 0, DIVISOR)
    tl.store(_at(out, n, c, h, w), total.to(out.ptr.dtype.element_ty), mask=inside)


@triton.jit
def _zeros(image, BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr):
    """Return the empty sums of a tile: of int8 in int32, exact, of others in fp32."""
    DTYPE: tl.constexpr = tl.int32 if image.ptr.dtype.element_ty == tl.int8 else tl.float32
    return tl.zeros((BLOCK_CHANNELS, BLOCK_PIXELS), DTYPE)


@triton.jit
def _mean(total, count, scales, DTYPE: tl.constexpr, DIVISOR: tl.constexpr):
    """Return the average in DTYPE: total / divisor, or total · (scale / divisor) in its scale."""
    if scales is None:
        return _divide(total, count, DIVISOR).to(DTYPE)
    else:
        scale = tl.full((1, 1), scales.input, tl.float32)
        factor = _divide(tl.broadcast_to(scale, (1, total.shape[1])), count, DIVISOR)
        return narrowed(total.to(tl.float32) * factor, scales.inverse_output, DTYPE)


@triton.jit
def _divide(total, count, DIVISOR: tl.constexpr):
    """total / DIVISOR, or total / count if DIVISOR is 0; correctly rounded, which Triton's ``/`` is not."""
    if DIVISOR == 0:
        return tl.div_rn(total, tl.broadcast_to(count, total.shape).to(tl.float32))
    else:
        return tl.div_rn(total, tl.full(total.shape, DIVISOR, tl.float32))
