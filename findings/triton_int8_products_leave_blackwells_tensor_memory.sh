#!/usr/bin/env bash
# A product of int8 compiles to mma.sync on Blackwell's sm_100, as on an A100, where fp16 and float8 get tcgen05.mma.
#
# One would guess that tl.dot uses the architecture's own instruction for every dtype that has one: on Hopper the same
# three kernels are wgmma. PTX has tcgen05.mma of kind::i8 for sm_100a, but Triton writes none: the sum stays in
# registers, operands are read from shared memory by every warp, and nothing says so. Whoever ports an int8 network from
# an H100 to a B200 gets the instructions of 2020 there.
#
# What gpukern does about it: docs/quantization.md tells to choose "fp8" on such GPUs.
#
# Seen with triton 3.7.1 (2026-11-30):
#   fp16 sm_90: wgmma; fp16 sm_100: tcgen05.mma
#   fp8e4nv sm_90: wgmma; fp8e4nv sm_100: tcgen05.mma
#   i8 sm_90: wgmma; i8 sm_100: mma.sync
# Exit status 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" triton==3.7.1
cat >"$folder/dot.py" <<'PYTHON'
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget


@triton.jit
def product(a, b, c, SUM: tl.constexpr):
    rows, columns, along = tl.arange(0, 128), tl.arange(0, 128), tl.arange(0, 64)
    total = tl.zeros((128, 128), SUM)
    for step in range(16):
        x = tl.load(a + rows[:, None] * 1024 + step * 64 + along[None, :])
        y = tl.load(b + columns[None, :] * 1024 + step * 64 + along[:, None])
        total = tl.dot(x, y, total, out_dtype=SUM)
    tl.store(c + rows[:, None] * 128 + columns[None, :], total)


seen = {}
for dtype, sum_dtype in (("fp16", tl.float32), ("fp8e4nv", tl.float32), ("i8", tl.int32)):
    signature = {"a": f"*{dtype}", "b": f"*{dtype}", "c": "*i32" if dtype == "i8" else "*fp32", "SUM": "constexpr"}
    for capability in (90, 100):
        source = triton.compiler.ASTSource(product, signature, {"SUM": sum_dtype})
        ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
        names = {"wgmma": "wgmma.mma_async", "tcgen05.mma": "tcgen05.mma.", "mma.sync": "mma.sync."}
        seen[dtype, capability] = " ".join(name for name, written in names.items() if written in ptx)
        print(f"{dtype} sm_{capability}: {seen[dtype, capability]}")
print("triton", triton.__version__)
expected = {(dtype, 90): "wgmma" for dtype in ("fp16", "fp8e4nv", "i8")}
expected |= {("fp16", 100): "tcgen05.mma", ("fp8e4nv", 100): "tcgen05.mma", ("i8", 100): "mma.sync"}
sys.exit(0 if seen == expected else "the behaviour changed")
PYTHON
TRITON_CACHE_DIR="$folder/cache" PYTHONPATH="$folder/site" python3 "$folder/dot.py"
