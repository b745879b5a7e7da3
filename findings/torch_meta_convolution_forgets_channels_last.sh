#!/usr/bin/env bash
# On torch's meta device a convolution of channels_last tensors gives contiguous (NCHW) strides; on the CPU, on CUDA and
# under FakeTensorMode it gives channels_last.
#
# One would guess that "meta" answers what a real device would, strides included, and use it to ask for the layout of a
# result without computing it. The gradients of the same convolution do have the right strides there.
#
# What gpukern does about it: its tests ask torch's CPU kernels for strides; its own operators give the strides of the
# real result on every device (tests/test_operators.py).
#
# Seen with torch 2.13.0 (2026-11-28), image [2, 16, 8, 8], filters [32, 16, 3, 3]:
#   cpu   (2048, 1, 256, 32)
#   fake  (2048, 1, 256, 32)
#   meta  (2048, 64, 8, 1)
# Exit status 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" torch==2.13.0 numpy==2.4.6
cat >"$folder/strides.py" <<'PYTHON'
import sys

import torch
from torch._subclasses import FakeTensorMode


def strides(device):
    x, w = (torch.empty(size, device=device) for size in ((2, 16, 8, 8), (32, 16, 3, 3)))
    x, w = (each.to(memory_format=torch.channels_last) for each in (x, w))
    return torch.nn.functional.conv2d(x, w, padding=1).stride()


found = {"cpu": strides("cpu"), "meta": strides("meta")}
with FakeTensorMode():
    found["fake"] = strides("cpu")
for name, each in found.items():
    print(f"{name:5} {each}")
print("torch", torch.__version__)
as_seen = found["cpu"] == found["fake"] == (2048, 1, 256, 32) and found["meta"] == (2048, 64, 8, 1)
sys.exit(0 if as_seen else "the behaviour changed")
PYTHON
PYTHONPATH="$folder/site" python3 "$folder/strides.py"
