"""Sums of products of int8 four at a time: bytes of neighbouring sources in a word, and as many taps in another.

What is decided at compile time is in ``Dots`` of ``plan.py``.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def word_start(dots, word):
    """Return the first source of a word."""
    return dots.words[word]


@triton.constexpr_function
def word_count(dots):
    return len(dots.words)


@triton.constexpr_function
def shift_at(dots, index):
    return dots.shifts[index]


@triton.constexpr_function
def shift_count(dots):
    return len(dots.shifts)


@triton.constexpr_function
def in_fours(dots):
    return dots.channels % 4 == 0


@triton.constexpr_function
def is_first(dots, output, word):
    """Whether no word before this one is read by an output."""
    return all(shift is None for shift in dots.shifts_of(output)[:word])


@triton.constexpr_function
def shift_index(dots, output, word):
    """Return which shift of the filter a word of sources meets for an output; -1 if the output does not read it."""
    shift = dots.shifts_of(output)[word]
    return -1 if shift is None else dots.shifts.index(shift)


#: Four words of four elements each, their bytes transposed: eight instructions, where single bytes take twenty.
_TRANSPOSE = tl.constexpr(
    "// four tiles of bytes in words\n"
    "{ .reg .b32 a, b, c, d; prmt.b32 a, $4, $5, 0x5140; prmt.b32 b, $6, $7, 0x5140; prmt.b32 c, $4, $5, 0x7362; "
    "prmt.b32 d, $6, $7, 0x7362; prmt.b32 $0, a, b, 0x5410; prmt.b32 $1, a, b, 0x7632; prmt.b32 $2, c, d, 0x5410; "
    "prmt.b32 $3, c, d, 0x7632; }"
)


@triton.jit
def packed(values, BASE: tl.constexpr, START: tl.constexpr, LIMIT: tl.constexpr, IN_FOURS: tl.constexpr):
    """Return the int8 tiles START … START + 3 of those from BASE on as bytes of int32; zeros outside of 0 … LIMIT − 1.

    IN_FOURS: a thread has four elements of each tile, or a multiple.
    """
    a = _tile(values, BASE, START, LIMIT)
    b = _tile(values, BASE, START + 1, LIMIT)
    c = _tile(values, BASE, START + 2, LIMIT)
    d = _tile(values, BASE, START + 3, LIMIT)
    if IN_FOURS:
        word = tl.inline_asm_elementwise(
            _TRANSPOSE,
            "=r,=r,=r,=r,r,r,r,r",
            [a, b, c, d],
            dtype=tl.int32,
            is_pure=True,
            pack=4,
        )
    else:
        word = _byte(a) | (_byte(b) << 8) | (_byte(c) << 16) | (_byte(d) << 24)
        word = word.to(tl.int32, bitcast=True)
    return word


@triton.jit
def _tile(values, BASE: tl.constexpr, AT: tl.constexpr, LIMIT: tl.constexpr):
    if AT >= 0 and AT < LIMIT:
        return values[BASE + AT]
    else:
        return tl.zeros(values[BASE].shape, tl.int8)


@triton.jit
def _byte(tile):
    return tile.to(tl.uint8, bitcast=True).to(tl.uint32)


@triton.jit
def dot(a, b):
    """Return the sum of the four products of bytes of ``a`` and ``b``, both int32."""
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, 0;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def add_dot(a, b, total):
    """Return ``total`` plus that."""
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1
    )
