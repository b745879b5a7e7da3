"""Kernels in 8 bits outside the matrix products: wide accesses, fused multiply-adds, nothing spilled."""

from __future__ import annotations

import json
import re

import pytest

CODE = """
import json
import torch
from gpukern.runtime import device, sass
from gpukern.runtime.compile_only import record_launches
from tests.compile.launches import _passes_of_8_bits

found = {}
with record_launches(device.H200) as launches:
    for run in _passes_of_8_bits():
        run()
for launch in launches:
    if launch.dtypes[0] in ("int8", "float16") and launch.kernel not in found:
        compiled = launch.compile()
        read = sass.read_sass(compiled)
        found[launch.kernel] = {
            "spills": read.spills,
            "code": compiled.asm["sass"],
            "loop": dict(max(read.loops, key=lambda loop: loop.length).instructions) if read.loops else {},
        }
print(json.dumps(found))
"""


@pytest.mark.slow
def test_accesses_are_wide_and_products_fused(run_python):
    result = run_python(CODE, GPUKERN_PLANS="")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert len(found) == 6 and not any(kernel["spills"] for kernel in found.values())
    for name in ("max_pool2d_quantized_kernel", "avg_pool2d_kernel", "quantize_kernel", "dequantize_kernel"):
        accesses = re.findall(r"\b(?:LDG|STG)\.E\S*", found[name]["code"])
        assert accesses and all(".128" in access for access in accesses), name
    depthwise = found["conv2d_depthwise_kernel"]["loop"]
    # Sixteen outputs of nine taps; the compiler is told not to fuse what the epilogue multiplies and adds.
    assert depthwise["FFMA"] == 144 and depthwise["FMUL"] + depthwise["FADD"] <= 6 * 16
    assert depthwise["LDG"] <= 12
