#!/usr/bin/env bash
# Triton's interpreter checks every sum, difference and product of integers for overflow, and never reads the answer.
#
# Its options say sanitize_overflow=True, so one would guess that an int32 index that overflows, the classic fault of
# tensors beyond 2³¹ elements, raises in an emulated kernel. It wraps in silence: the check ends in device_assert, which
# returns at once unless the options have debug set, and the interpreter's never have; TRITON_DEBUG=1 makes no difference.
# The check itself is computed all the same, on tensors of 64 bits: one multiplication of indices makes four more NumPy
# operations, and kernels that compute indices spend most of their emulated time on such checks.
#
# What gpukern does about it: it emulates without the check where nobody reads it (gpukern/runtime/emulation_speed.py; a
# small convolution and its gradients took 0.5 s for 3.0 s, with types and patches shared), and has tests of its own for
# indices beyond 2³¹.
#
# Seen with triton 3.7.1 (2026-11-29):
#   2**30 * 4 in int32 is 0, no error; with TRITON_DEBUG=1 too
#   NumPy operations of one int32 multiplication: 5 (multiply 2, less_equal 1, greater_equal 1, bitwise_and 1)
# Exit status 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 triton==3.7.1 'numpy<2.5'
cat >"$folder/overflow.py" <<'PYTHON'
import collections
import sys

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, interpreter_builder


@triton.jit
def multiply(out, a, b):
    tl.store(out, a * b)


counts = collections.Counter()
plain = InterpreterBuilder.binary_op


def counting(self, lhs, rhs, op):
    counts[op.__name__] += 1
    return plain(self, lhs, rhs, op)


InterpreterBuilder.binary_op = counting
out = torch.full((1,), -1, dtype=torch.int32)
multiply[(1,)](out, 2**30, 4)
options = interpreter_builder.options
print(f"triton {triton.__version__}: sanitize_overflow={options.sanitize_overflow}, debug={options.debug}")
print(f"2**30 * 4 in int32 is {out.item()}, no error; operations: {dict(counts)}")
as_seen = out.item() == 0 and options.sanitize_overflow and not options.debug and sum(counts.values()) > 1
sys.exit(0 if as_seen else "the behaviour changed")
PYTHON
for debug in 0 1; do
    TRITON_DEBUG=$debug TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/overflow.py"
done
