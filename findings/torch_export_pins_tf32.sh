#!/usr/bin/env bash
# torch.export reads and writes the TF32 flags of cuDNN: it fails where the user chose the precision of convolutions by
# the new flag, and elsewhere it leaves convolutions with a precision of their own.
#
# One would guess that capturing a model leaves global flags as they are, and that
# torch.backends.cudnn.conv.fp32_precision = "ieee", which torch recommends in place of allow_tf32, cannot keep a model
# from being captured. But torch.export switches cuDNN off by torch.backends.cudnn.set_flags and puts back what that
# returned, the old allow_tf32 among it: reading it raises where convolutions and recurrent layers differ, and writing it
# makes an inherited precision an explicit one, so that torch.backends.fp32_precision = "ieee", set later, no longer
# reaches convolutions: they stay in TF32.
#
# What gpukern does about it: gpukern.fuse keeps torch.export from the flags (gpukern/fusion/capture.py), and
# tests/runtime/test_precision.py sees that they are as before.
#
# Seen with torch 2.13.0 (2026-11-29), on a CPU:
#   convolutions by their own flag: RuntimeError from torch.export
#   ieee for all, without export: ieee
#   ieee for all, after an export: tf32
# Exit status 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" torch==2.13.0 numpy==2.4.6
cat >"$folder/flags.py" <<'PYTHON'
import sys

import torch

model, image = torch.nn.Conv2d(3, 4, 3).eval(), torch.randn(1, 3, 8, 8)
case = sys.argv[1]
if case == "own":
    torch.backends.cudnn.conv.fp32_precision = "ieee"
if case != "none":
    try:
        torch.export.export(model, (image,))
    except RuntimeError:
        print("RuntimeError from torch.export")
        sys.exit()
torch.backends.fp32_precision = "ieee"
print(torch.backends.cudnn.conv.fp32_precision)
PYTHON
run() { PYTHONPATH="$folder/site" python3 "$folder/flags.py" "$1"; }
own=$(run own) none=$(run none) after=$(run after)
echo "convolutions by their own flag: $own"
echo "ieee for all, without export: $none"
echo "ieee for all, after an export: $after"
[ "$own" = "RuntimeError from torch.export" ] && [ "$none" = ieee ] && [ "$after" = tf32 ] ||
    { echo "the behaviour changed"; exit 1; }
