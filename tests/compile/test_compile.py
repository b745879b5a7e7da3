"""Every configuration that plans choose compiles for sm_80 and sm_90 to the machine code that was meant.

No GPU is needed: Triton compiles for a named architecture and ships a disassembler. ``make gate`` does the same for
every distinct launch instead of one for each configuration.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpukern.runtime import device

ROOT = Path(__file__).resolve().parents[2]
SHARES = 4


def compile_share(architecture: str, share: int, of: int = SHARES, *options: str) -> list[dict]:
    """Rows of :mod:`tests.compile.worker`, in a process of its own: this one may have the interpreter in place."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GPUKERN_EMULATE", "TRITON_INTERPRET")}
    result = subprocess.run(
        [sys.executable, "-m", "tests.compile.worker", architecture, str(share), str(of), *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def faults(row: dict, limit: int) -> list[str]:
    """What is wrong with one compiled kernel; ``limit`` is the device's shared memory for a block, in bytes."""
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    found = []
    if row["spills"] or row["stack"]:
        found.append(f"{row['spills']} spills, {row['stack']} bytes of stack")
    if row["shared_memory"] > limit:
        found.append(f"{row['shared_memory']} bytes of shared memory, the device has {limit}")
    if multiplies_matrices(row) and not row["tensor_core"]:
        found.append("no tensor-core instruction")
    # A sum over a single pixel has no loop left.
    if copies_asynchronously(row) and row["loop"] and not row["loop"].get("LDGSTS"):
        found.append("main loop without asynchronous copies")
    return found


def multiplies_matrices(row: dict) -> bool:
    """Whether the kernel is a matrix product for tensor cores: fp32 in full precision has none."""
    options = row["options"]
    full_fp32 = "float32" in row["dtypes"] and options.get("PRECISION") == "ieee"
    return options.get("VARIANT") in ("taps", "flat") and not full_fp32


def copies_asynchronously(row: dict) -> bool:
    """Whether both operands lie in whole runs of channels of at least 16 bytes, which cp.async can copy."""
    options = row["options"]
    wide = min(int(options.get("SOURCE_ALIGN", 0)), int(options.get("FILTER_ALIGN", options.get("GRAD_ALIGN", 0)))) >= 8
    return multiplies_matrices(row) and options["VARIANT"] == "taps" and wide


@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("architecture", ["A100", "H100"])
def test_machine_code(architecture, share):
    rows = compile_share(architecture, share)
    assert len(rows) > 50
    limit = getattr(device, architecture).shared_memory
    bad = {json.dumps({**row, "loop": None}): faults(row, limit) for row in rows if faults(row, limit)}
    assert not bad, "\n".join(f"{found}: {row}" for row, found in bad.items())
    assert any(row.get("tensor_core") == ("HGMMA" if architecture == "H100" else "HMMA") for row in rows)


PLANTED = """
import json, sys
import torch, triton
from gpukern.ops._conv2d import prepare
from gpukern.ops._conv2d.plan import ConvPlan, Variant
from gpukern.runtime.compile_only import record_launches
from gpukern.runtime.device import A100
import gpukern.functional as F
from tests.compile.worker import describe

prepare.plan = lambda *_: ConvPlan(Variant.TAPS, 128, 256, 64, num_warps=4, num_stages=int(sys.argv[1]))
x = torch.empty(8, 256, 28, 28).half().contiguous(memory_format=torch.channels_last)
w = torch.empty(256, 256, 3, 3).half().contiguous(memory_format=torch.channels_last)
with record_launches(A100) as launches:
    F.conv2d(x, w, padding=1)
print(json.dumps(describe(launches[-1])))
"""


@pytest.mark.parametrize("stages, fault", [(2, "spills"), (5, "shared memory")])
def test_a_planted_bad_configuration_is_caught(stages, fault, run_python):
    """A tile too large for the registers, or with too many stages for the shared memory, on sm_80."""
    result = run_python(PLANTED, str(stages))
    assert result.returncode == 0, result.stderr
    assert any(fault in found for found in faults(json.loads(result.stdout), device.A100.shared_memory))
