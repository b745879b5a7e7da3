"""Weight gradient of large batches over TMA boxes of the same pixel of many images: Hopper and newer.

Seen as [P, Q, N, K], a box of ∂L/∂y that holds one pixel of BLOCK_K images meets, for every tap, one box of x seen as
[H, W, N, C]. So stride and dilation only move the boxes, and a tap outside the image is skipped instead of multiplied
by zeros. Boxes that reach beyond the last image hold zeros there, in both operands.
"""

import triton
import triton.language as tl

from gpukern.conv.indexing import tile_order
from gpukern.ops._reduction.shared_sums import last_to_arrive, leave_part, total_of


@triton.jit
def inside_range(tap, padding, inputs, outputs, STRIDE: tl.constexpr, DILATION: tl.constexpr):
    """Return (first, end) of rows with 0 ≤ row · STRIDE + tap · DILATION − padding < inputs; end ≤ first if none."""
    before = padding - tap * DILATION
    # A division of negative numbers may round either way: clamp both to 0 or more.
    first = tl.maximum(before + STRIDE - 1, 0) // STRIDE
    end = tl.minimum(tl.maximum(inputs - 1 + before + STRIDE, 0) // STRIDE, outputs)
    return first, end


@triton.jit(do_not_specialize=["fan_in"])
def conv2d_batch_box_weight_grad_kernel(
    grad,  # descriptor of ∂L/∂y [P, Q, N, K]
    source,  # descriptor of x [H, W, N, C]
    out,  # ∂L/∂w [K, R · S, C]: a descriptor, or a pointer where splits share sums
    shared,  # SharedSums of TOGETHER · BLOCK_M · BLOCK_N a tile, or None for one split
    batch,
    in_h,
    in_w,
    out_h,
    out_w,
    outputs,  # K
    inputs,  # C
    padding_h,
    padding_w,
    fan_in,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BLOCK_M: tl.constexpr,  # output channels
    TOGETHER: tl.constexpr,  # neighbouring taps of a filter row that a program takes; divides TAPS_W
    BLOCK_N: tl.constexpr,  # input channels
    BLOCK_K: tl.constexpr,  # images
    GROUP_M: tl.constexpr,
    CHUNK: tl.constexpr,  # see last_to_arrive
    PRECISION: tl.constexpr,
):
    """out[k, (r, s), c] = Σ_{n, p, q} grad[n, k, p, q] · source[n, c, moved by (r, s)].

    Grid: (tiles, splits of the sum), a tile for every TOGETHER taps, which share the boxes of grad; where only some of
    them lie in the image, the others read zeros. Tiles of one block of channels, which read the same, are neighbours.
    """
    GROUPS: tl.constexpr = TAPS_W // TOGETHER
    tap = tl.program_id(0) % (TAPS_H * GROUPS) * TOGETHER
    pid_m, pid_n = tile_order(
        tl.program_id(0) // (TAPS_H * GROUPS), tl.cdiv(outputs, BLOCK_M), tl.cdiv(inputs, BLOCK_N), GROUP_M
    )
    k = pid_m * BLOCK_M
    c = pid_n * BLOCK_N
    r = tap // TAPS_W
    s = tap % TAPS_W
    first_p, end_p = inside_range(r, padding_h, in_h, out_h, STRIDE_H, DILATION_H)
    # The last of neighbouring taps is the first to enter the image and the first to leave it.
    _, end_q = inside_range(s, padding_w, in_w, out_w, STRIDE_W, DILATION_W)
    first_q, _ = inside_range(s + TOGETHER - 1, padding_w, in_w, out_w, STRIDE_W, DILATION_W)
    rows = tl.maximum(end_p - first_p, 0)
    cols = tl.maximum(end_q - first_q, 0)
    image_steps = tl.cdiv(batch, BLOCK_K)
    steps = rows * cols * image_steps
    share = tl.cdiv(steps, tl.num_programs(1))
    first = tl.program_id(1) * share
    image = first % image_steps * BLOCK_K
    # A tap may have no pixels: avoid a division by zero.
    q = first_q + first // image_steps % tl.maximum(cols, 1)
    p = first_p + first // image_steps // tl.maximum(cols, 1)
    dh = r * DILATION_H - padding_h
    dw = s * DILATION_W - padding_w
    sums = (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),) * TOGETHER
    for _ in range(min(steps - first, share)):
        dy = grad.load([p, q, image, k]).reshape(BLOCK_K, BLOCK_M)
        added = ()
        for t in tl.static_range(TOGETHER):
            x = source.load([p * STRIDE_H + dh, q * STRIDE_W + dw + t * DILATION_W, image, c])
            added += (tl.dot(dy.T, x.reshape(BLOCK_K, BLOCK_N), sums[t], input_precision=PRECISION),)
        sums = added
        # A select, not a branch: operands whose addresses come out of a branch are fetched too late.
        image += BLOCK_K
        next_pixel = image >= batch
        image = tl.where(next_pixel, 0, image)
        q = tl.where(next_pixel, q + 1, q)
        next_row = q == end_q
        q = tl.where(next_row, first_q, q)
        p = tl.where(next_row, p + 1, p)
    if shared is None:
        for t in tl.static_range(TOGETHER):
            out.store([k, tap + t, c], sums[t].to(out.dtype).reshape(BLOCK_M, 1, BLOCK_N))
    else:
        OF_TAP: tl.constexpr = BLOCK_M * BLOCK_N
        SIZE: tl.constexpr = TOGETHER * OF_TAP
        tile, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
        for t in tl.static_range(TOGETHER):
            leave_part(sums[t], shared, tile, split, splits, fan_in, t * OF_TAP, SIZE)
        if last_to_arrive(shared, tile, split, splits, fan_in, SIZE, CHUNK):
            for start in range(0, SIZE, CHUNK):
                i = start + tl.arange(0, CHUNK)
                total = total_of(shared, tile, splits, fan_in, i, SIZE)
                row = k + i % OF_TAP // BLOCK_N
                column = c + i % BLOCK_N
                place = (row.to(tl.int64) * (TAPS_H * TAPS_W) + (tap + i // OF_TAP)) * inputs + column
                inside = (i < SIZE) & (row < outputs) & (column < inputs)
                tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)
