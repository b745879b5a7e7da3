#!/usr/bin/env bash
# group_norm of a bias without a weight computes, but has no backward on a CPU: "tensor does not have a device".
#
# weight and bias are optional, each by itself, in the signatures of group_norm and layer_norm. layer_norm's gradients
# are right with a bias alone; group_norm's forward too, and its backward then asks the missing weight for its device.
# A weight alone is fine in both. Whoever trains a norm with a shift only finds out in the first backward pass.
#
# What gpukern does about it: either operand may be missing, forward and backward (tests/ops/test_group_norm.py).
#
# Seen with torch 2.13.0 (2026-11-29), gradients of the sum:
#   layer_norm, bias alone     right
#   group_norm, weight alone   right
#   group_norm, bias alone     RuntimeError: tensor does not have a device
# Exit status 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat >"$folder/bias.py" <<'PYTHON'
import sys

import torch
import torch.nn.functional as F


def outcome(norm, *parameters):
    x = torch.randn(2, 4, 3, requires_grad=True)
    try:
        norm(x, *parameters).sum().backward()
    except RuntimeError as error:
        return f"RuntimeError: {error}"
    return "right" if all(p is None or p.grad is not None for p in parameters) else "no gradient"


def parameter(size):
    return torch.ones(size, requires_grad=True)


print(f"torch {torch.__version__}: gradients of a norm with one of weight and bias")
seen = {
    "layer_norm, bias alone": outcome(lambda x, *p: F.layer_norm(x, (3,), *p), None, parameter(3)),
    "group_norm, weight alone": outcome(lambda x, *p: F.group_norm(x, 2, *p), parameter(4), None),
    "group_norm, bias alone": outcome(lambda x, *p: F.group_norm(x, 2, *p), None, parameter(4)),
}
for name, said in seen.items():
    print(f"{name:26} {said}")
right = list(seen.values())[:2] == ["right"] * 2 and "does not have a device" in seen["group_norm, bias alone"]
sys.exit(0 if right else "the behaviour changed")
PYTHON
"$folder/venv/bin/python" "$folder/bias.py"
