"""Small kernels to record and compile: one that reads through a descriptor, one in Gluon, one that calls another."""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@triton.jit
def doubled(x):
    return 2.0 * x


@triton.jit
def double_kernel(x_ptr, pair, y_ptr, size, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset, mask=offset < size)
    tl.store(y_ptr + offset, doubled(x) + tl.load(pair[0]) + pair[1], mask=offset < size)


@triton.jit
def copy_box_kernel(source, out, row):
    out.store([row, 0], source.load([row, 0]))


@gluon.jit
def copy_gluon_kernel(x_ptr, y_ptr, BLOCK: gl.constexpr):
    offset = gl.arange(0, BLOCK, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(y_ptr + offset, gl.load(x_ptr + offset))
