"""Functions shared by the group norm kernels: tiles of whole groups, and sums over a group."""

import triton
import triton.language as tl


@triton.jit
def group_tile(
    tile, channels,
    GROUP: tl.constexpr,  # channels of a group
    BLOCK_D: tl.constexpr,  # columns of a group, at least so many
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return (channel, whether it exists, group) of each column of a tile of whole groups, [BLOCK_C].

    One dimension: what is loaded at two, [1, BLOCK_C], a thread loads once for each pixel that it reads at once.
    """
    column = tl.arange(0, BLOCK_C)
    if GROUP == BLOCK_D:
        c = tile * BLOCK_C + column
        return c, c < channels, c // GROUP
    else:
        group = tile * (BLOCK_C // BLOCK_D) + column // BLOCK_D
        place = column % BLOCK_D
        return group * GROUP + place, (place < GROUP) & (group * GROUP < channels), group


@triton.jit
def group_sum(values, BLOCK_D: tl.constexpr):
    """Return the sum over the columns of each group, in every one of them. values: [BLOCK_C]."""
    COLUMNS: tl.constexpr = values.shape[0]
    if BLOCK_D == 1:
        return values
    elif BLOCK_D == COLUMNS:
        return tl.broadcast_to(tl.sum(values, 0), (COLUMNS,))
    else:
        totals = tl.sum(tl.reshape(values, (COLUMNS // BLOCK_D, BLOCK_D)), 1)[:, None]
        return tl.reshape(tl.broadcast_to(totals, (COLUMNS // BLOCK_D, BLOCK_D)), (COLUMNS,))
