#!/usr/bin/env bash
# Triton hands fp32 operands of a TF32 product to the tensor cores as they are, on sm_80 and on sm_90.
#
# One would guess that `tl.dot(..., input_precision="tf32")`, the default, rounds its operands to TF32, as cuBLAS and
# cuDNN do and as the PTX manual asks of mma's .tf32 operands ("must be converted by cvt"). There is no `cvt.rna.tf32.f32`
# in its PTX, only in that of "tf32x3". The tensor cores then drop the low 13 bits of each operand, always towards zero:
# on an H200, products of positive operands were too small by 7.0e-4 in the mean, against 2e-6 where operands were
# rounded. The emulator on the CPU shows none of this: it multiplies in full fp32.
#
# What gpukern does about it: its kernels round (cvt.rna in registers, tensor maps of type TFLOAT32 on the way to shared
# memory), see gpukern/runtime/precision.py and tests/ops/test_conv2d_tf32.py.
#
# Seen with triton 3.7.1 (2026-11-28):
#   sm_80 tf32: 0 cvt.rna for 64 mma      sm_80 tf32x3: 160 cvt.rna
#   sm_90 tf32: 0 cvt.rna for 8 wgmma     sm_90 tf32x3: 64 cvt.rna
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
def product(a, b, c, PRECISION: tl.constexpr):
    place = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(c + place, tl.dot(tl.load(a + place), tl.load(b + place), input_precision=PRECISION))


signature = {"a": "*fp32", "b": "*fp32", "c": "*fp32", "PRECISION": "constexpr"}
roundings = {}
for capability in (80, 90):
    for precision in ("tf32", "tf32x3"):
        source = triton.compiler.ASTSource(product, signature, {"PRECISION": precision})
        ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
        products = ptx.count("mma.sync") + ptx.count("wgmma.mma_async")
        roundings[capability, precision] = ptx.count("cvt.rna.tf32")
        print(f"sm_{capability} {precision}: {roundings[capability, precision]} cvt.rna, {products} products")
print("triton", triton.__version__)
as_seen = all((count == 0) == (precision == "tf32") for (_, precision), count in roundings.items())
sys.exit(0 if as_seen else "the behaviour changed")
PYTHON
TRITON_CACHE_DIR="$folder/cache" PYTHONPATH="$folder/site" python3 "$folder/dot.py"
