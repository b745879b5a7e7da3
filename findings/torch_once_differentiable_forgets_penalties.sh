#!/usr/bin/env bash
# A gradient penalty through a function that is @once_differentiable is no error: its part of the gradient is zero.
#
# once_differentiable is documented as the mark of a backward that cannot itself be differentiated; one expects an error
# from whoever tries. The error comes only where the incoming gradient requires a gradient. The usual gradient penalty
# starts from y.sum(), whose incoming gradient is a constant: then the result of torch.autograd.grad(create_graph=True)
# requires no gradient, and a penalty made of it adds nothing to loss.backward(), without a word.
#
# What gpukern does about it: none of its functions carries the mark. SyncBatchNorm, whose backward has no derivative
# yet, raises an error in both cases (gpukern/ops/sync_batch_norm.py; tests/ops/test_sync_batch_norm.py).
#
# Seen with torch 2.13.0 (2026-11-29), y = x³ at x = 2, loss = y + (dy/dx)², whose derivative is 3x² + 36x³ = 300:
#   backward without the mark    dy/dx requires a gradient True    x.grad 300.0
#   @once_differentiable         dy/dx requires a gradient False   x.grad 12.0
#   the same, gradient required  RuntimeError: trying to differentiate twice a function that was marked with @once_differentiable
# Exit status 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat >"$folder/penalty.py" <<'PYTHON'
import sys

import torch
from torch.autograd.function import once_differentiable


def cube(mark):
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @mark
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return 3 * x**2 * g

    return Cube.apply


def penalized(function, along=None):
    x = torch.tensor([2.0], requires_grad=True)
    y = function(x)
    (slope,) = torch.autograd.grad(y, x, torch.ones_like(y) if along is None else along, create_graph=True)
    (y.sum() + slope.square().sum()).backward()
    return slope.requires_grad, x.grad.item()


print(f"torch {torch.__version__}: loss = y + (dy/dx)² of y = x³ at 2, derivative 300")
seen = [penalized(cube(lambda backward: backward)), penalized(cube(once_differentiable))]
for name, (requires, grad) in zip(("backward without the mark", "@once_differentiable"), seen):
    print(f"{name:28} dy/dx requires a gradient {requires!s:7} x.grad {grad}")
try:
    said = penalized(cube(once_differentiable), torch.ones(1, requires_grad=True))
except RuntimeError as error:
    said = str(error)
print(f"the same, gradient required  {said}")
right = seen == [(True, 300.0), (False, 12.0)] and "once_differentiable" in str(said)
sys.exit(0 if right else "the behaviour changed")
PYTHON
"$folder/venv/bin/python" "$folder/penalty.py"
