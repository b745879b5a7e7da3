#!/usr/bin/env bash
# InstanceNorm's running statistics are NaN for ever after one empty batch in training; BatchNorm's stay what they were.
#
# The last batch of a sharded or filtered loader can be empty. torch's batch norm takes one and leaves its running mean
# and variance alone. Instance norm is batch norm of a reshaped tensor inside, but averages what that gives over the
# batch: over no images, 0/0. Nothing is raised, training goes on by batch statistics, and evaluation gives NaN.
#
# What gpukern does about it: running statistics of instance norm stay what they were (tests/ops/test_group_norm.py).
#
# Seen with torch 2.13.0 (2026-11-29), running mean and variance after training on [0, 2, 4, 4], and the output of an
# image in evaluation:
#   BatchNorm2d      [0.0, 0.0]  [1.0, 1.0]  finite True
#   InstanceNorm2d   [nan, nan]  [nan, nan]  finite False
# Exit status 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat >"$folder/empty.py" <<'PYTHON'
import sys

import torch

print(f"torch {torch.__version__}: running mean and variance after an empty batch, then evaluation")
seen = []
for kind in (torch.nn.BatchNorm2d, torch.nn.InstanceNorm2d):
    norm = kind(2, track_running_stats=True)
    norm(torch.empty(0, 2, 4, 4))
    finite = bool(norm.eval()(torch.randn(1, 2, 4, 4)).isfinite().all())
    seen.append(finite)
    print(f"{kind.__name__:16} {norm.running_mean.tolist()}  {norm.running_var.tolist()}  finite {finite}")
sys.exit(0 if seen == [True, False] else "the behaviour changed")
PYTHON
"$folder/venv/bin/python" "$folder/empty.py"
