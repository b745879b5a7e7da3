"""Warp-specialized convolution in Gluon, one producer warp and eight consumer warps, for Hopper alone.

The same boxes of pixels as in the ``box`` package, but nothing is left to the compiler: the fetching warp runs ahead
through all tiles of its program, as far as the ring of buffers allows, and the multiplying warps neither compute
addresses nor wait for a new tile's first loads. Buffer i is handed over by two barriers:

- ``full[i]`` completes when TMA has written the expected number of bytes;
- ``empty[i]`` completes when the products that read it are done.

A barrier's phase is the parity of its completions. Both sides walk the ring in the same order and carry (buffer, phase)
along; the fetching warp starts at phase 1, which a new barrier counts as passed, so that its first round does not wait.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from gpukern.conv.epilogue import store_statistics
from gpukern.conv.indexing import tile_order
from gpukern.ops._activation.functions import apply_activation
from gpukern.ops._reduction.functions import merge_in_groups

# Triton 3.8 renamed these and 3.9 removed the old names.
fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
write_back = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


class Window(NamedTuple):
    """Sizes of the output and of a tile's window: source row = row + r · dilation_h − padding_h, r < taps_h."""

    batch: object
    rows: object
    cols: object
    columns: object
    reduction: object  # channels summed over
    taps_h: object
    taps_w: object
    dilation_h: object
    dilation_w: object
    padding_h: object
    padding_w: object


@gluon.jit
def conv2d_warp_specialized_kernel(
    source,  # descriptor of x [N, H, W, C], or of ∂L/∂y when TRANSPOSED
    filter,  # descriptor of w [R, S, K, C]
    out,  # descriptor of y [N, P, Q, K], or of ∂L/∂x when TRANSPOSED
    residual,  # descriptor like out, or None
    bias_ptr,  # [columns] or None
    statistics,  # Statistics, or None
    window,  # Window
    negative_slope,
    TRANSPOSED: gl.constexpr,
    BUFFERS: gl.constexpr,
    GROUP_M: gl.constexpr,
    ACTIVATION: gl.constexpr,
):
    """y = act(x ∗ w + bias + residual), stride 1. Grid: as many programs as run at once; each takes every such tile.

    The input gradient is a convolution of ∂L/∂y too, its taps in the opposite direction: a window whose dilation and
    padding are negative.
    """
    # Triton does not support [BUFFERS, *shape].
    sources = gl.allocate_shared_memory(source.dtype, [BUFFERS] + source.block_shape, source.layout)  # noqa: RUF005
    filters = gl.allocate_shared_memory(filter.dtype, [BUFFERS] + filter.block_shape, filter.layout)  # noqa: RUF005
    empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    arrived = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        mbarrier.init(empty.index(i), count=1)
        mbarrier.init(full.index(i), count=1)
    mbarrier.init(arrived.index(0), count=1)
    staged = gl.allocate_shared_memory(out.dtype, out.block_shape, out.layout)
    ring = (sources, filters, empty, full)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    out,
                    residual,
                    bias_ptr,
                    statistics,
                    window,
                    negative_slope,
                    ring,
                    staged,
                    arrived.index(0),
                    TRANSPOSED,
                    GROUP_M,
                    ACTIVATION,
                ),
            ),
            (_fetch_all, (source, filter, out, window, ring, TRANSPOSED, GROUP_M)),
        ],
        [1],
        [24],  # registers of a fetching thread, the minimum: the others get the rest
    )


@gluon.jit
def _fetch_all(source, filter, out, window, ring, TRANSPOSED: gl.constexpr, GROUP_M: gl.constexpr):
    sources, filters, empty, full = ring
    BUFFERS: gl.constexpr = empty.shape[0]
    BLOCK_K: gl.constexpr = source.block_shape[3]
    NBYTES: gl.constexpr = source.block_type.nbytes + filter.block_type.nbytes
    tiles = _boxes(out, window) * gl.cdiv(window.columns, out.block_shape[3])
    i = 0
    phase = 1
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        _, n, p, q, k = _tile(index, out, window, GROUP_M)
        for r in range(window.taps_h):
            h = p + r * window.dilation_h - window.padding_h
            for s in range(window.taps_w):
                w = q + s * window.dilation_w - window.padding_w
                for c in range(0, window.reduction, BLOCK_K):
                    mbarrier.wait(empty.index(i), phase)
                    mbarrier.expect(full.index(i), NBYTES)
                    fetch(source, [n, h, w, c], full.index(i), sources.index(i))
                    if TRANSPOSED:
                        fetch(filter, [r, s, c, k], full.index(i), filters.index(i))
                    else:
                        fetch(filter, [r, s, k, c], full.index(i), filters.index(i))
                    i, phase = _next(i, phase, BUFFERS)


@gluon.jit
def _multiply(
    out,
    residual,
    bias_ptr,
    statistics,
    window,
    negative_slope,
    ring,
    staged,  # where a tile's residual arrives and its result leaves
    arrived,  # barrier of the residual
    TRANSPOSED: gl.constexpr,
    GROUP_M: gl.constexpr,
    ACTIVATION: gl.constexpr,
):
    sources, filters, empty, full = ring
    BUFFERS: gl.constexpr = empty.shape[0]
    BLOCK_N: gl.constexpr = out.block_shape[3]
    BLOCK_M: gl.constexpr = out.block_shape[0] * out.block_shape[1] * out.block_shape[2]
    BLOCK_K: gl.constexpr = sources.shape[4]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])

    arrived_phase = 0
    steps = window.taps_h * window.taps_w * gl.cdiv(window.reduction, BLOCK_K)
    boxes = _boxes(out, window)
    tiles = boxes * gl.cdiv(window.columns, BLOCK_N)
    i = 0
    phase = 0
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        box, n, p, q, k = _tile(index, out, window, GROUP_M)
        if residual is not None:
            tma.store_wait(0)
            fence_async_shared()
            mbarrier.expect(arrived, out.block_type.nbytes)
            fetch(residual, [n, p, q, k], arrived, staged)
        acc = warpgroup_mma_init(gl.zeros((BLOCK_M, BLOCK_N), gl.float32, LAYOUT))
        previous = 0
        for step in range(steps):
            mbarrier.wait(full.index(i), phase)
            a = sources.index(i).reshape((BLOCK_M, BLOCK_K))
            if TRANSPOSED:
                b = filters.index(i).reshape((BLOCK_K, BLOCK_N))
            else:
                b = filters.index(i).reshape((BLOCK_N, BLOCK_K)).permute((1, 0))
            acc = warpgroup_mma(a, b, acc, is_async=True)
            # The products of the step before are done once those of this one are the only ones left.
            acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
            mbarrier.arrive(empty.index(previous), pred=step > 0)
            previous = i
            i, phase = _next(i, phase, BUFFERS)
        result = warpgroup_mma_wait(0, deps=(acc,))  # [BLOCK_M, BLOCK_N]
        mbarrier.arrive(empty.index(previous))

        if bias_ptr is not None:
            column = k + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
            bias = gl.load(bias_ptr + column, mask=column < window.columns, other=0.0).to(gl.float32)
            result += gl.expand_dims(bias, 0)
        tile = staged.reshape((BLOCK_M, BLOCK_N))
        if residual is not None:
            mbarrier.wait(arrived, arrived_phase)
            arrived_phase ^= 1
            result += tile.load(LAYOUT).to(gl.float32)
        else:
            # The write-back of the tile before has had a whole main loop to read what is overwritten here.
            tma.store_wait(0)
        tile.store(apply_activation(result, ACTIVATION, negative_slope).to(out.dtype))
        fence_async_shared()
        write_back(out, [n, p, q, k], staged)
        if statistics is not None:
            _store_statistics(tile, statistics, box, n, p, q, k, out, window)
    tma.store_wait(0)


@gluon.jit
def _next(i, phase, BUFFERS: gl.constexpr):
    """Return the next (buffer, phase)."""
    i += 1
    wrapped = i == BUFFERS
    return gl.where(wrapped, 0, i), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def _boxes(out, window):
    BOX: gl.constexpr = out.block_shape
    return gl.cdiv(window.batch, BOX[0]) * gl.cdiv(window.rows, BOX[1]) * gl.cdiv(window.cols, BOX[2])


@gluon.jit
def _tile(index, out, window, GROUP_M: gl.constexpr):
    """Return the box of tile ``index`` and the tile's start: (box, image, row, column, channel)."""
    BOX: gl.constexpr = out.block_shape
    box, block = tile_order(index, _boxes(out, window), gl.cdiv(window.columns, BOX[3]), GROUP_M)
    tiles_h = gl.cdiv(window.rows, BOX[1])
    tiles_w = gl.cdiv(window.cols, BOX[2])
    n = box // tiles_w // tiles_h
    p = box // tiles_w % tiles_h
    q = box % tiles_w
    return box, n * BOX[0], p * BOX[1], q * BOX[2], block * BOX[3]


@gluon.jit
def _store_statistics(tile, statistics, box, n, p, q, k, out, window):
    """Store and merge statistics, see ``store_statistics``; ``tile`` [BLOCK_M, BLOCK_N] is in shared memory."""
    BOX: gl.constexpr = out.block_shape
    # The whole tile at once would not fit into the registers.
    BLOCK_N: gl.constexpr = BOX[3]
    COLUMNS: gl.constexpr = min(BLOCK_N, 64)
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, COLUMNS, 16])
    pixel = gl.arange(0, BOX[0] * BOX[1] * BOX[2], layout=gl.SliceLayout(1, LAYOUT))
    n_ok = n + pixel // (BOX[1] * BOX[2]) < window.batch
    p_ok = p + pixel // BOX[2] % BOX[1] < window.rows
    q_ok = q + pixel % BOX[2] < window.cols
    inside = gl.expand_dims(n_ok & p_ok & q_ok, 1)
    boxes = _boxes(out, window)
    for start in gl.static_range(0, BLOCK_N, COLUMNS):
        value = tile.slice(start, COLUMNS, dim=1).load(LAYOUT).to(gl.float32)
        column = k + start + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
        # Broadcast to the tile: one column has another thread layout than the sums, and converting it takes registers.
        valid, _ = gl.broadcast(inside, value)
        store_statistics(value, valid, statistics, box, boxes, column, window.columns, AXIS=0)
    READ: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [gl.num_warps(), 1], [1, 0])
    part = gl.expand_dims(gl.arange(0, 32, layout=gl.SliceLayout(1, READ)), 1)
    lane = gl.expand_dims(gl.arange(0, 32, layout=gl.SliceLayout(0, READ)), 0)
    columns = window.columns
    merge_in_groups(statistics, box, boxes, k // BLOCK_N, k, columns, columns, part, lane, BLOCK_N, 1, None)
