#!/usr/bin/env bash
# tl.maximum of a number and a NaN is the number on a GPU, and NaN in Triton's interpreter.
#
# tl.maximum has propagate_nan=NONE by default: compiled, it is max.f32, which gives the operand that is no NaN. One
# would guess that the interpreter follows the option; it calls numpy.maximum for both, so that an emulated kernel shows
# a NaN that its GPU would hide, and a test of NaNs passes without a GPU and fails with one. tl.minimum is the same.
#
# What gpukern does about it: where a NaN must stay, its kernels ask for it by propagate_nan=ALL, as pools do
# (gpukern/conv/epilogue.py), and what must not depend on it selects by a comparison.
#
# Seen with triton 3.7.1 (2026-11-30):
#   interpreter: maximum(nan, 1) is nan
#   sm_90: max.f32 by default, max.NaN.f32 with propagate_nan=ALL
# Exit status 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" \
    torch==2.13.0 triton==3.7.1 numpy==2.4.6
cat >"$folder/larger.py" <<'PYTHON'
import os
import sys

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget


@triton.jit
def larger(out, a, b, KEEPS_NAN: tl.constexpr):
    place = tl.arange(0, 32)
    x, y = tl.load(a + place), tl.load(b + place)
    if KEEPS_NAN:
        tl.store(out + place, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL))
    else:
        tl.store(out + place, tl.maximum(x, y))


if os.environ.get("TRITON_INTERPRET") == "1":
    out, a, b = torch.empty(32), torch.full((32,), float("nan")), torch.ones(32)
    larger[(1,)](out, a, b, False)
    print(f"interpreter: maximum(nan, 1) is {out[0].item()}")
    sys.exit(0 if out.isnan().all() else "the behaviour changed")
instructions = []
for keeps in (False, True):
    signature = {"out": "*fp32", "a": "*fp32", "b": "*fp32", "KEEPS_NAN": "constexpr"}
    source = triton.compiler.ASTSource(larger, signature, {"KEEPS_NAN": keeps})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    instructions += [name for name in ("max.f32", "max.NaN.f32") if name in ptx]
print(f"sm_90: {instructions[0]} by default, {instructions[-1]} with propagate_nan=ALL; triton {triton.__version__}")
sys.exit(0 if instructions == ["max.f32", "max.NaN.f32"] else "the behaviour changed")
PYTHON
for interpret in 1 0; do
    TRITON_INTERPRET=$interpret TRITON_CACHE_DIR="$folder/cache" PYTHONPATH="$folder/site" python3 "$folder/larger.py"
done
