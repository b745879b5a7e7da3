"""Rounding to TF32 in registers, for kernels whose operands are loaded through pointers."""

import triton
import triton.language as tl


@triton.jit
def rounded(x, PRECISION: tl.constexpr, MOVABLE: tl.constexpr = True):
    """Round ``x`` to the nearest TF32 if it is an fp32 operand of a TF32 product.

    Tensor cores truncate operands, which would make every product of positive ones smaller by 7 in 10,000; see
    ``gpukern/runtime/precision.py``. TMA rounds what a descriptor loads.

    Unless ``MOVABLE``, the values are rounded in the layout in which they were loaded. Otherwise the compiler may round
    them after they went through shared memory into the product's layout, or even load them in that layout.
    """
    if PRECISION == "tf32" and x.dtype == tl.float32:
        x = tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=MOVABLE, pack=1
        )
    return x
