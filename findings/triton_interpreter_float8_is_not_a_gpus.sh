#!/usr/bin/env bash
# Triton's interpreter rounds fp32 to float8e4nv otherwise than every GPU: large numbers and NaN become small ones.
#
# One would guess that .to(tl.float8e4nv) in an emulated kernel gives what torch gives for float8_e4m3fn, which is what
# cvt.rn.satfinite gives on a GPU: the nearest number, of two equally near the even one, at most 448, and NaN for NaN.
# The interpreter rounds halves up, loses a carry among its smallest numbers, lets 500 wrap to 256, and makes 384 of a
# NaN. A kernel tested there passes or fails for reasons that no GPU has.
#
# What gpukern does about it: emulated kernels convert as a GPU does (gpukern/runtime/emulation_float8.py), and
# tests/runtime compares every float8 and the numbers between them.
#
# Seen with triton 3.7.1 and torch 2.13.0 (2026-11-30), interpreter beside torch:
#   1.0625: 1.125, 1
#   500: 256, 448
#   1e+06: 480, 448
#   nan: 384, nan
#   0.00292969: 0.00195312, 0.00390625
# Exit status 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" \
    torch==2.13.0 triton==3.7.1 numpy==2.4.6
cat >"$folder/cast.py" <<'PYTHON'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def there_and_back(out, x, N: tl.constexpr):
    place = tl.arange(0, N)
    tl.store(out + place, tl.load(x + place).to(tl.float8e4nv).to(tl.float32))


x = torch.tensor([1.0625, 500.0, 1e6, float("nan"), 3 * 2.0**-10, 1.1875, 15.6, 448.0])
found = torch.empty_like(x)
there_and_back[(1,)](found, x, len(x))
wanted = x.to(torch.float8_e4m3fn).float()
print(f"triton {triton.__version__}, torch {torch.__version__.partition('+')[0]}")
for number, ours, theirs in zip(x.tolist(), found.tolist(), wanted.tolist()):
    print(f"{number:g}: {ours:g}, {theirs:g}")
differ = [a != b and not (a != a and b != b) for a, b in zip(found.tolist(), wanted.tolist())]
sys.exit(0 if differ == [True] * 5 + [False] * 3 else "the behaviour changed")
PYTHON
TRITON_INTERPRET=1 PYTHONPATH="$folder/site" python3 "$folder/cast.py"
