#!/usr/bin/env bash
# torch.compile(backend="eager") computes a checkpointed part again with other random numbers: wrong gradients, no warning.
#
# torch.utils.checkpoint keeps the state of the random number generator, so that dropout draws the same mask when the
# part is computed again in backward. Dynamo replaces the call by an operator of its own, which asks for the opposite
# (preserve_rng_state=False) because AOTAutograd makes random numbers functions of a counter. Backends that run Dynamo's
# graph as it is ("eager", which is what one switches to for debugging, and any backend of one's own that returns
# gm.forward) get no such counter: forward uses one mask, backward another. preserve_rng_state=True, the default, given
# by name makes no difference.
#
# What gpukern does about it: its backend runs such a part by torch.utils.checkpoint itself (gpukern/compiler/
# checkpointing.py; tests/compiler).
#
# Seen with torch 2.13.0 (2026-11-29): for y = dropout(w)² and sum(y), ∂/∂w = 2 y / w wherever one mask is used
#   without compile   the gradient is that of the output: True
#   backend=eager     the gradient is that of the output: False
#   backend=aot_eager the gradient is that of the output: True
# Exit status 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat >"$folder/masks.py" <<'PYTHON'
import sys

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def part(w):
    return F.dropout(w, 0.5, training=True).square()


def model(w):
    return checkpoint(part, w, use_reentrant=False, preserve_rng_state=True)


def one_mask(function):
    torch.manual_seed(0)
    w = torch.randn(64).requires_grad_()
    y = function(w)
    y.sum().backward()
    return torch.allclose(w.grad * w / 2, y)


print(f"torch {torch.__version__}, dropout in a checkpointed part")
seen = {"without compile": one_mask(model)}
for backend in ("eager", "aot_eager"):
    torch._dynamo.reset()
    seen[f"backend={backend}"] = one_mask(torch.compile(model, backend=backend))
for name, right in seen.items():
    print(f"{name:17} the gradient is that of the output: {right}")
sys.exit(0 if list(seen.values()) == [True, False, True] else "the behaviour changed")
PYTHON
"$folder/venv/bin/python" "$folder/masks.py"
