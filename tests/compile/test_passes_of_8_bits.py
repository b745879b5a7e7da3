"""Kernels in 8 bits outside the matrix products: wide accesses, four products at once, nothing spilled."""

from __future__ import annotations

import json
import re

import pytest

CODE = """
import json
from gpukern.runtime import device, sass
from gpukern.runtime.compile_only import record_launches
from tests.compile.quantized import E4M3, INT8, passes

found = {}
with record_launches(device.H200) as launches:
    for run in (*passes(INT8), *passes(E4M3)):
        run()
for launch in launches:
    name = launch.kernel
    if launch.dtypes[0] == "float8_e4m3fn":
        name += ", float8_e4m3fn"
    if name not in found and ("depthwise" in name or "float8" not in name):
        compiled = launch.compile()
        read = sass.read_sass(compiled)
        found[name] = {
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
    assert len(found) == 7 and not any(kernel["spills"] for kernel in found.values())
    for name in ("max_pool2d_quantized_kernel", "avg_pool2d_kernel", "quantize_kernel", "dequantize_kernel"):
        accesses = re.findall(r"\b(?:LDG|STG)\.E\S*", found[name]["code"])
        assert accesses and all(".128" in access for access in accesses), name
    # Sixteen outputs of nine taps, three of them in each product of words. Bytes are moved to transpose 8 words in two
    # steps, and to pack outputs and unpack the residual.
    depthwise = found["conv2d_depthwise_kernel"]["loop"]
    assert depthwise["IDP"] == 48 and depthwise["PRMT"] <= 40 and depthwise["LDG"] <= 12
    # Of float8_e4m3fn in fp32, the compiler being told not to fuse what the epilogue multiplies and adds.
    assert found["conv2d_depthwise_kernel, float8_e4m3fn"]["loop"]["FFMA"] == 144
