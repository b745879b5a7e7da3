"""Rounding to TF32 in registers, for kernels whose operands come there through pointers."""

import triton
import triton.language as tl


@triton.jit
def rounded(x, PRECISION: tl.constexpr, MOVABLE: tl.constexpr = True):
    """``x``, rounded to the nearest TF32 if it is an fp32 operand of a TF32 product.

    Tensor cores cut operands, which would make every product of positive ones smaller by 7 in 10,000; see
    ``gpukern/runtime/precision.py``. What a descriptor fetches the copy engine rounds.

    Unless ``MOVABLE`` the values are rounded as they were loaded. Otherwise the compiler may do so after they went
    through shared memory into the order that the product wants, or even load them in that order.
    """
    if PRECISION == "tf32" and x.dtype == tl.float32:
        x = tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=MOVABLE, pack=1
        )
    return x
