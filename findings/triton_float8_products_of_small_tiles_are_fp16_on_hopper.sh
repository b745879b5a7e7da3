#!/usr/bin/env bash
# A float8 product of fewer than 64 rows becomes a product of fp16 on Hopper, and stays one of float8 on the older Ada.
#
# One would guess that tl.dot of two float8 tiles uses the float8 tensor cores of a GPU that has them, and that a newer
# architecture does so wherever an older one does. But the float8 products of sm_90 are wgmma's alone, which take 64 rows;
# for smaller tiles Triton converts both operands to fp16 in registers, in every step of the loop, and multiplies those:
# half the rate and a conversion a pair, with no warning. On sm_89 the same kernel is one mma.sync of e4m3.
#
# What gpukern does about it: it offers no tiles of fewer than 64 rows for float8 on Hopper
# (gpukern/conv/families/implicit_gemm/plan.py), and tests/compile looks for conversions in the loops of 8 bits.
#
# Seen with triton 3.7.1 (2026-11-30):
#   sm_89, 32 rows: mma.sync of e4m3, 0 conversions
#   sm_90, 64 rows: wgmma of e4m3, 0 conversions
#   sm_90, 32 rows: mma.sync of f16, 48 conversions
# Exit status 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" triton==3.7.1
cat >"$folder/dot.py" <<'PYTHON'
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget


@triton.jit
def product(a, b, c, ROWS: tl.constexpr):
    rows, along = tl.arange(0, ROWS), tl.arange(0, 64)
    x = tl.load(a + rows[:, None] * 64 + along[None, :])
    y = tl.load(b + along[None, :] * 64 + along[:, None])
    tl.store(c + rows[:, None] * 64 + along[None, :], tl.dot(x, y))


signature = {"a": "*fp8e4nv", "b": "*fp8e4nv", "c": "*fp32", "ROWS": "constexpr"}
seen = []
for capability, rows in ((89, 32), (90, 64), (90, 32)):
    source = triton.compiler.ASTSource(product, signature, {"ROWS": rows})
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    instruction = "wgmma" if "wgmma.mma_async" in ptx else "mma.sync"
    operands = "f16" if re.search(r"mma\S*\.f16\.f16", ptx) else "e4m3"
    conversions = ptx.count("cvt.rn.f16x2.e4m3x2")
    seen.append((instruction, operands, conversions > 0))
    print(f"sm_{capability}, {rows} rows: {instruction} of {operands}, {conversions} conversions")
print("triton", triton.__version__)
expected = [("mma.sync", "e4m3", False), ("wgmma", "e4m3", False), ("mma.sync", "f16", True)]
sys.exit(0 if seen == expected else "the behaviour changed")
PYTHON
TRITON_CACHE_DIR="$folder/cache" PYTHONPATH="$folder/site" python3 "$folder/dot.py"
