"""Random numbers by counting: Philox 4×32 in ten rounds, as CUDA's generators and torch's own kernels compute it."""

import triton
import triton.language as tl


@triton.jit
def four_numbers(counter, key, offset):
    """Return four blocks of 32 random bits (uint32) for each ``counter`` of a block, int32 or int64."""
    low = counter.to(tl.uint32)
    zero = low * 0
    high = zero
    if counter.dtype.primitive_bitwidth > 32:
        high = (counter >> 32).to(tl.uint32)
    offset = tl.to_tensor(offset).to(tl.uint64)
    return tl.philox(key, zero + (offset & 0xFFFFFFFF).to(tl.uint32), zero + (offset >> 32).to(tl.uint32), low, high)


@triton.jit
def number_at(i, key, offset):
    """Return the 32 random bits of each place ``i`` of a block: a counter makes those of four neighbours."""
    a, b, c, d = four_numbers(i // 4, key, offset)
    return tl.where(i % 4 < 2, tl.where(i % 4 == 0, a, b), tl.where(i % 4 == 2, c, d))


@triton.jit
def numbers_from(first, key, offset, BLOCK: tl.constexpr):
    """Return those of so many places from ``first``, a multiple of 4: each thread has neighbours, as it loads them."""
    a, b, c, d = four_numbers(first // 4 + tl.arange(0, BLOCK // 4), key, offset)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK,))
