#!/usr/bin/env bash
# max_pool3d in channels_last_3d sends the gradient of a masked window to the first plane of the volume.
#
# A window that holds nothing but −∞ (a masked region) has its maximum in its first element; max_pool3d finds it there in
# the usual layout. In channels_last_3d on a CPU the index is that of the first element in the plane, without the depth:
# the value is right, return_indices gives the first plane for every window, and the backward pass adds all their
# gradients there. The same tensor in the other layout has other gradients.
#
# What gpukern does about it: the same indices in both layouts (tests/ops/test_pool3d.py).
#
# Seen with torch 2.13.0 (2026-11-29), [1, 2, 4, 2, 2] of −∞, windows (1, 2, 2): indices of the first channel, and the
# gradient of the sum at the first place of each plane:
#   contiguous_format  [0, 4, 8, 12]   [1.0, 1.0, 1.0, 1.0]
#   channels_last_3d   [0, 0, 0, 0]    [4.0, 0.0, 0.0, 0.0]
# Exit status 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat >"$folder/masked.py" <<'PYTHON'
import sys

import torch
import torch.nn.functional as F

print(f"torch {torch.__version__}: max_pool3d of a masked volume, windows of one plane")
seen = []
for layout in (torch.contiguous_format, torch.channels_last_3d):
    x = torch.full((1, 2, 4, 2, 2), -torch.inf).contiguous(memory_format=layout).requires_grad_()
    y, indices = F.max_pool3d(x, (1, 2, 2), return_indices=True)
    y.sum().backward()
    seen.append((indices[0, 0].flatten().tolist(), x.grad[0, 0, :, 0, 0].tolist()))
    print(f"{str(layout).removeprefix('torch.'):18} {seen[-1][0]!s:15} {seen[-1][1]}")
right = seen == [([0, 4, 8, 12], [1.0] * 4), ([0, 0, 0, 0], [4.0, 0.0, 0.0, 0.0])]
sys.exit(0 if right else "the behaviour changed")
PYTHON
"$folder/venv/bin/python" "$folder/masked.py"
