#!/usr/bin/env bash
# On a CPU torch's grouped convolutions give wrong numbers, without a word, if the filter is in channels_last and has a
# dimension of one element with another stride than torch would give it.
#
# One would guess that the stride of a dimension with one element means nothing: is_contiguous() says so, and nothing is
# ever read that far away. oneDNN is told of a weight [groups, K / groups, ...] by strides that seem to follow from
# it. Without groups, with filters in NCHW and without oneDNN all is well. Such strides come from as_strided(), from
# permuted and unsqueezed filters and from other libraries' arrays; contiguous() leaves them.
#
# What gpukern does about it: its path in plain torch gives filters the usual strides first
# (gpukern/conv/reference.py).
#
# Seen with torch 2.13.0 (2026-11-30), image [1, 32, 6, 7], filters [32, 16, 1, 3], 2 groups:
#   usual strides (48, 1, 48, 16)    error 6e-06
#   other strides (48, 1, 1536, 16)  error 4e+01
#   ... without oneDNN               error 6e-06
# Exit status 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" torch==2.13.0 numpy==2.4.6
cat >"$folder/strides.py" <<'PYTHON'
import sys

import torch
from torch.nn.functional import conv2d

torch.manual_seed(0)
image, filters = (torch.randn(size).to(memory_format=torch.channels_last) for size in ((1, 32, 6, 7), (32, 16, 1, 3)))
other = filters.as_strided(filters.shape, (48, 1, 1536, 16))
assert torch.equal(filters, other) and other.is_contiguous(memory_format=torch.channels_last)
exact = conv2d(image.double(), filters.double(), groups=2)


def error(weight):
    return (conv2d(image, weight, groups=2) - exact).abs().max().item()


found = error(filters), error(other)
with torch.backends.mkldnn.flags(enabled=False):
    found = *found, error(other)
for name, each in zip(("usual strides", "other strides", "... without oneDNN"), found):
    print(f"{name:20} error {each:.0e}")
print("torch", torch.__version__)
sys.exit(0 if found[0] < 1e-4 and found[1] > 1 and found[2] < 1e-4 else "the behaviour changed")
PYTHON
PYTHONPATH="$folder/site" python3 "$folder/strides.py"
