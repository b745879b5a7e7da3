"""Depthwise convolution of sequences, [N, C, 1, L] with [C, 1, 1, S] and stride 1: each sequence is read about once.

The unit of work is a group of WIDTH neighbouring outputs of a channel, for which a thread reads the sources of all
taps. Where positions are adjacent in memory it reads the vectors of WIDTH elements in which these lie, and takes them
apart in registers; where channels are, it reads one position after the other, of as many channels as one access takes.
What two groups read is in the cache. Forward and input gradient are the same sum, of sources before or after an output.

Tiles are [channels, groups] where the source's positions are adjacent (PLANES), and [groups, channels] where channels
are, so that neighbouring threads access neighbouring elements; below, SHAPE stands for either. Memory is accessed in
tiles [..., WIDTH], or in WIDTH tiles SHAPE.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gpukern.ops._activation.functions import apply_activation
from gpukern.ops._reduction.functions import merge_statistics, store_part
from gpukern.ops._reduction.shared_sums import last_to_arrive, leave_part, total_of


class Sequences(NamedTuple):
    """A tensor [N, C, L]: a pointer, and its strides in elements."""

    ptr: Any
    n: Any
    c: Any
    l: Any  # noqa: E741


@triton.constexpr_function
def count(taps):
    return len(taps.offsets)


@triton.constexpr_function
def offset_of(taps, tap):
    return taps.offsets[tap]


@triton.constexpr_function
def loads(taps, joined):
    return len(taps.needed(joined))


@triton.constexpr_function
def needed(taps, joined, load):
    return taps.needed(joined)[load]


@triton.constexpr_function
def element(taps, joined, tap, i):
    """The place, among the elements loaded, of the source that ``tap`` joins to the i-th output."""
    return taps.element(joined, taps.offsets[tap] + i)


@triton.constexpr_function
def log2(width):
    return width.bit_length() - 1


@triton.jit
def inside(i, size):
    # Compared without sign, a negative index is larger than any size.
    return tl.cast(i, tl.int32).to(tl.uint32, bitcast=True) < tl.cast(size, tl.uint32)


@triton.jit
def places(tensor, n, c, position, ACCESS: tl.constexpr, INDEX: tl.constexpr):
    """Pointers to (n, c, position); dividing and multiplying strides shows the compiler what divides them."""
    both: tl.constexpr = max(ACCESS.channels, ACCESS.positions)
    stride_n = tl.cast(tensor.n, INDEX) // both * both
    stride_c = tl.cast(tensor.c, INDEX) // ACCESS.positions * ACCESS.positions
    stride_l = tl.cast(tensor.l, INDEX) // ACCESS.channels * ACCESS.channels
    return tensor.ptr + n.to(INDEX) * stride_n + (c.to(INDEX) * stride_c + position.to(INDEX) * stride_l)


@triton.jit
def taken_apart(values, WIDTH: tl.constexpr):
    """[..., WIDTH] as WIDTH tiles SHAPE."""
    parts = (values,)
    for level in tl.static_range(log2(WIDTH)):
        # Part i has the elements that are i modulo 2ˡᵉᵛᵉˡ.
        even = ()
        odd = ()
        for i in tl.static_range(len(parts)):
            pairs = tl.reshape(parts[i], (values.shape[0], values.shape[1], WIDTH // 2 // 2**level, 2))
            first, second = tl.split(pairs)
            even += (first,)
            odd += (second,)
        parts = even + odd
    result = ()
    for i in tl.static_range(WIDTH):
        result += (tl.reshape(parts[i], (values.shape[0], values.shape[1])),)
    return result


@triton.jit
def put_together(parts, WIDTH: tl.constexpr):
    """Invert :func:`taken_apart`."""
    for level in tl.static_range(log2(WIDTH)):
        joined = ()
        for i in tl.static_range(WIDTH // 2 // 2**level):
            pair = tl.join(parts[i], parts[i + WIDTH // 2 // 2**level])
            if len(pair.shape) == 4:
                pair = tl.reshape(pair, (pair.shape[0], pair.shape[1], 2 * pair.shape[2]))
            joined += (pair,)
        parts = joined
    return parts[0]


@triton.jit
def load_sources(
    tensor, n, c, group, c_ok, length,
    FOOTPRINT: tl.constexpr, ACCESS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The sources of a group's outputs, in fp32; zeros outside the sequence. :func:`element` finds one."""
    WIDTH: tl.constexpr = FOOTPRINT.width
    values = ()
    for i in tl.static_range(loads(FOOTPRINT, ACCESS.joined)):
        if ACCESS.joined:
            # Whole vectors are inside or outside.
            first = (group + needed(FOOTPRINT, ACCESS.joined, i)) * WIDTH
            ok = (inside(first, length) & c_ok)[:, :, None]
            at = places(tensor, n, c[:, :, None], first[:, :, None] + lanes(WIDTH), ACCESS, INDEX)
            values += taken_apart(tl.load(at, mask=ok, other=0.0).to(tl.float32), WIDTH)
        else:
            position = group * WIDTH + needed(FOOTPRINT, ACCESS.joined, i)
            at = places(tensor, n, c, position, ACCESS, INDEX)
            values += (tl.load(at, mask=inside(position, length) & c_ok, other=0.0).to(tl.float32),)
    return values


@triton.jit
def along_channels(index, PLANES: tl.constexpr):
    return index[:, None] if PLANES else index[None, :]


@triton.jit
def along_groups(index, PLANES: tl.constexpr):
    return index[None, :] if PLANES else index[:, None]


@triton.jit
def over_groups(values, PLANES: tl.constexpr):
    return tl.sum(values, axis=1 if PLANES else 0, keep_dims=True)


@triton.jit
def channels_inside(c, channels, RUN: tl.constexpr, PLANES: tl.constexpr):
    """Whether channels exist: all or none of RUN neighbours."""
    ok = c < channels
    # Triton 3.7 fails if it is told of a tile of one element.
    return tl.max_constancy(ok, (RUN, 1) if PLANES else (1, RUN)) if RUN > 1 else ok


@triton.jit
def lanes(WIDTH: tl.constexpr):
    return tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def positions_inside(group, length, WIDTH: tl.constexpr, ACCESS: tl.constexpr):
    """Whether the positions of groups exist, [..., WIDTH]: all or none of those that one access takes."""
    return tl.max_constancy(group[:, :, None] * WIDTH + lanes(WIDTH) < length, (1, 1, min(WIDTH, ACCESS.positions)))


@triton.jit
def load_group(tensor, n, c, group, c_ok, length, WIDTH: tl.constexpr, ACCESS: tl.constexpr, INDEX: tl.constexpr):
    """The WIDTH elements of a group, in fp32; zeros beyond the end of the sequence."""
    if ACCESS.joined:
        at = places(tensor, n, c[:, :, None], group[:, :, None] * WIDTH + lanes(WIDTH), ACCESS, INDEX)
        ok = positions_inside(group, length, WIDTH, ACCESS) & c_ok[:, :, None]
        return taken_apart(tl.load(at, mask=ok, other=0.0).to(tl.float32), WIDTH)
    else:
        values = ()
        for i in tl.static_range(WIDTH):
            at = places(tensor, n, c, group * WIDTH + i, ACCESS, INDEX)
            ok = (group * WIDTH + i < length) & c_ok
            values += (tl.load(at, mask=ok, other=0.0).to(tl.float32),)
        return values


@triton.jit
def store_group(
    tensor, values, n, c, group, c_ok, length, WIDTH: tl.constexpr, ACCESS: tl.constexpr, INDEX: tl.constexpr
):
    if ACCESS.joined:
        at = places(tensor, n, c[:, :, None], group[:, :, None] * WIDTH + lanes(WIDTH), ACCESS, INDEX)
        ok = positions_inside(group, length, WIDTH, ACCESS) & c_ok[:, :, None]
        tl.store(at, put_together(values, WIDTH), mask=ok)
    else:
        for i in tl.static_range(WIDTH):
            at = places(tensor, n, c, group * WIDTH + i, ACCESS, INDEX)
            tl.store(at, values[i], mask=(group * WIDTH + i < length) & c_ok)


# ---- forward and input gradient ------------------------------------------------------------------------------------


@triton.jit
def conv2d_depthwise1d_kernel(
    source,  # Sequences [N, C, L]: x, or ∂L/∂y
    filter_ptr,  # [C, S]
    filter_c, filter_s,  # its strides
    bias_ptr,  # [C] or None
    residual,  # Sequences like out, or None
    out,  # Sequences: y, or ∂L/∂x
    statistics,  # Statistics or None
    channels, source_length, out_length,
    negative_slope,
    FOOTPRINT: tl.constexpr,  # Taps, whose width is WIDTH
    SOURCE: tl.constexpr, OUT: tl.constexpr,  # Access of each
    PLANES: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,  # channels and groups of a program
    ACTIVATION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """out[n, c, q] = act(Σ_s source[n, c, q + offset of s] · filter[c, s] + bias + residual).

    Grid: tiles along all sequences × blocks of channels, these innermost.
    """
    WIDTH: tl.constexpr = FOOTPRINT.width
    SHAPE: tl.constexpr = (BLOCK_C, BLOCK_G) if PLANES else (BLOCK_G, BLOCK_C)
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    blocks = tl.cdiv(out_length, BLOCK_G * WIDTH)
    tile = tl.program_id(0) // channel_blocks
    n = tile // blocks
    c = tl.program_id(0) % channel_blocks * BLOCK_C + along_channels(tl.arange(0, BLOCK_C), PLANES)
    c_ok = channels_inside(c, channels, min(BLOCK_C, max(SOURCE.channels, OUT.channels)), PLANES)
    group = tile % blocks * BLOCK_G + along_groups(tl.arange(0, BLOCK_G), PLANES)

    values = load_sources(source, n, c, group, c_ok, source_length, FOOTPRINT, SOURCE, INDEX)
    # Broadcast before the load: each thread reads what it needs, and no data is exchanged.
    own = tl.broadcast_to(c, SHAPE)
    own_ok = own < channels
    weights = ()
    for s in tl.static_range(count(FOOTPRINT)):
        w = tl.load(filter_ptr + (own * filter_c + s * filter_s), mask=own_ok, other=0.0)
        weights += (w.to(tl.float32),)
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + own, mask=own_ok, other=0.0).to(tl.float32)
    if residual is not None:
        added = load_group(residual, n, c, group, c_ok, out_length, WIDTH, OUT, INDEX)

    results = ()
    for i in tl.static_range(WIDTH):
        y = tl.zeros(SHAPE, tl.float32)
        for s in tl.static_range(count(FOOTPRINT)):
            y += values[element(FOOTPRINT, SOURCE.joined, s, i)] * weights[s]
        if bias is not None:
            y += bias
        if residual is not None:
            y += added[i]
        results += (apply_activation(y, ACTIVATION, negative_slope).to(out.ptr.dtype.element_ty),)
    store_group(out, results, n, c, group, c_ok, out_length, WIDTH, OUT, INDEX)

    if statistics is not None:
        total = tl.zeros(SHAPE, tl.float32)
        number = tl.zeros(SHAPE, tl.float32)
        for i in tl.static_range(WIDTH):
            ok = group * WIDTH + i < out_length
            total += tl.where(ok, results[i].to(tl.float32), 0.0)
            number += tl.where(ok, 1.0, 0.0)
        sums = over_groups(total, PLANES)
        counts = over_groups(number, PLANES)
        mean = sums / tl.maximum(counts, 1.0)
        squares = tl.zeros(SHAPE, tl.float32)
        for i in tl.static_range(WIDTH):
            apart = tl.where(group * WIDTH + i < out_length, results[i].to(tl.float32) - mean, 0.0)
            squares += apart * apart
        deviations = over_groups(squares, PLANES)
        tiles = tl.num_programs(0) // channel_blocks
        block = tl.program_id(0) % channel_blocks
        store_part(statistics.parts, (sums, deviations, counts), tile, tiles, c, c < channels, channels)
        merge_statistics(statistics, tile, tiles, block, block * BLOCK_C, channels, channels, BLOCK_C)


# ---- weight gradient -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["fan_in"])
def conv2d_depthwise1d_weight_grad_kernel(
    grad,  # Sequences [N, C, Q]: ∂L/∂y
    source,  # Sequences [N, C, L]: x
    out_ptr,  # [C, S]: ∂L/∂w
    out_c, out_s,  # its strides
    shared,  # SharedSums of BLOCK_C for each tap a tile, or None for one split
    batch, channels, source_length, grad_length,
    tiles_per_split,
    fan_in,
    FOOTPRINT: tl.constexpr,
    GRAD: tl.constexpr, SOURCE: tl.constexpr,  # Access of each
    PLANES: tl.constexpr,
    WHOLE: tl.constexpr,  # groups lie in the sequences of grad, or outside
    BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,  # channels and groups of a tile
    CHUNK: tl.constexpr,  # see last_to_arrive
    INDEX: tl.constexpr,
):  # fmt: skip
    """out[c, s] = Σ_{n, q} grad[n, c, q] · source[n, c, q + offset of s].

    Grid: (blocks of channels, splits). A split adds up tiles as of the forward convolution, in registers.
    """
    WIDTH: tl.constexpr = FOOTPRINT.width
    SHAPE: tl.constexpr = (BLOCK_C, BLOCK_G) if PLANES else (BLOCK_G, BLOCK_C)
    c = tl.program_id(0) * BLOCK_C + along_channels(tl.arange(0, BLOCK_C), PLANES)
    c_ok = channels_inside(c, channels, min(BLOCK_C, max(SOURCE.channels, GRAD.channels)), PLANES)
    blocks = tl.cdiv(grad_length, BLOCK_G * WIDTH)
    tiles = batch * blocks
    first = tl.program_id(1) * tiles_per_split

    sums = ()
    for _ in tl.static_range(count(FOOTPRINT)):
        sums += (tl.zeros(SHAPE, tl.float32),)
    for tile in range(first, min(first + tiles_per_split, tiles)):
        n = tile // blocks
        group = tile % blocks * BLOCK_G + along_groups(tl.arange(0, BLOCK_G), PLANES)
        # No source for what grad does not have: an infinite one would make NaN of its zero.
        exists = c_ok & (group * WIDTH < grad_length)
        grads = load_group(grad, n, c, group, c_ok, grad_length, WIDTH, GRAD, INDEX)
        values = load_sources(source, n, c, group, exists, source_length, FOOTPRINT, SOURCE, INDEX)
        new = ()
        for s in tl.static_range(count(FOOTPRINT)):
            total = sums[s]
            for i in tl.static_range(WIDTH):
                v = values[element(FOOTPRINT, SOURCE.joined, s, i)]
                if not WHOLE:
                    v = tl.where(group * WIDTH + i < grad_length, v, 0.0)
                total += grads[i] * v
            new += (total,)
        sums = new

    if shared is None:
        for s in tl.static_range(count(FOOTPRINT)):
            total = over_groups(sums[s], PLANES).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + (c * out_c + s * out_s), total, mask=c < channels)
    else:
        SIZE: tl.constexpr = count(FOOTPRINT) * BLOCK_C
        block, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
        for s in tl.static_range(count(FOOTPRINT)):
            part = over_groups(sums[s], PLANES)
            leave_part(part, shared, block, split, splits, fan_in, s * BLOCK_C, SIZE)
        if last_to_arrive(shared, block, split, splits, fan_in, SIZE, CHUNK):
            for start in range(0, SIZE, CHUNK):
                i = start + tl.arange(0, CHUNK)
                total = total_of(shared, block, splits, fan_in, i, SIZE).to(out_ptr.dtype.element_ty)
                channel = block * BLOCK_C + i % BLOCK_C
                place = out_ptr + (channel * out_c + i // BLOCK_C * out_s)
                tl.store(place, total, mask=(i < SIZE) & (channel < channels))
