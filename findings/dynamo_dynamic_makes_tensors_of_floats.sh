#!/usr/bin/env bash
# torch.compile(dynamic=True) gives a backend the eps and the momentum of a batch norm as tensors, not as numbers.
#
# dynamic=True reads as "sizes may change". It also frees every Python float that the model reads from an attribute: each
# becomes a graph input of float64 with no dimensions, followed by a call of item(). A backend that looks for
# batch_norm(x, mean, var, weight, bias, True, 0.1, 1e-05) finds nodes where it expects 0.1 and 1e-05: patterns that
# compare numbers match nothing, and what is moved in front of item() uses a value before it exists. With the default
# (dynamic=None) the same model, called with another batch size until its batch is free too, keeps the numbers.
#
# What gpukern does about it: numbers of a batch norm may be nodes, and a convolution takes its place in the graph after
# them (gpukern/compiler/lowering.py; tests/compiler).
#
# Seen with torch 2.13.0 (2026-11-29): arguments of batch_norm after training=True, and what kinds they are
#   dynamic=None, second batch size   [0.1, 1e-05]              floats True   free batch True
#   dynamic=True                      [item, item_1]            floats False  free batch True
# Exit status 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat >"$folder/floats.py" <<'PYTHON'
import sys

import torch
import torch.nn.functional as F


def captured(dynamic):
    graphs = []
    torch._dynamo.reset()
    model = torch.compile(
        torch.nn.BatchNorm1d(4), backend=lambda module, inputs: graphs.append(module.graph) or module, dynamic=dynamic
    )
    for batch in (3, 5):
        model(torch.randn(batch, 4))
    graph = graphs[-1]
    norm = next(node for node in graph.nodes if node.target is F.batch_norm)
    free = any(isinstance(size, torch.SymInt) for node in graph.nodes if node.op == "placeholder"
               for size in getattr(node.meta["example_value"], "shape", ()))
    return list(norm.args[6:8]), free


print(f"torch {torch.__version__}: momentum and eps of a batch norm, as a backend gets them")
seen = []
for name, dynamic in (("dynamic=None, second batch size", None), ("dynamic=True", True)):
    numbers, free = captured(dynamic)
    floats = all(isinstance(each, float) for each in numbers)
    seen.append((floats, free))
    print(f"{name:33} {str(numbers):25} floats {floats!s:6} free batch {free}")
sys.exit(0 if seen == [(True, True), (False, True)] else "the behaviour changed")
PYTHON
"$folder/venv/bin/python" "$folder/floats.py"
