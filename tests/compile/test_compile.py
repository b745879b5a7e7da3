"""Every configuration that plans choose compiles for sm_80 to sm_120 to the machine code that was meant.

No GPU is needed: Triton compiles for a named architecture and ships a disassembler. See ``README.md`` for what is
compiled here and what only by ``make gate``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from gpukern.runtime.device import A100, H100
from tests.compile.cache import ROOT
from tests.compile.faults import faults

#: Architecture, kind of operands, share: pieces of work of about a minute, for processes of their own.
PIECES = [
    *(("sm_90", "float16", f"{share}/3") for share in range(3)),
    ("sm_90", "tf32", "0/1"),
    ("sm_90", "float32", "0/1"),
    ("sm_80", "float16", "0/2"),
    ("sm_80", "float16", "1/2"),
    ("sm_80", "tf32", "0/1"),
    ("sm_80", "float32", "0/1"),
    ("sm_90", "bfloat16", "0/1"),
    ("sm_100", "float16", "0/1"),
    ("sm_80", "bfloat16", "0/1"),
    ("sm_120", "float16", "0/1"),
    ("sm_120", "float32", "0/1"),
    ("sm_80", "int8", "0/1"),
    ("sm_89", "float8", "0/1"),
    ("sm_90", "int8", "0/1"),
    ("sm_90", "float8", "0/1"),
]
TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA"}
#: Of products of 8 bits.
NARROW = {
    ("sm_80", "int8"): "IMMA",
    ("sm_89", "float8"): "QMMA",
    ("sm_90", "int8"): "IGMMA",
    ("sm_90", "float8"): "QGMMA",
}


def compile_piece(architecture: str, kind: str, share: str, *options: str) -> list[dict]:
    """Rows of :mod:`tests.compile.worker`, in a process of its own: this one may have the interpreter in place."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GPUKERN_EMULATE", "TRITON_INTERPRET")}
    result = subprocess.run(
        [sys.executable, "-m", "tests.compile.worker", architecture, kind, "--share", share, *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def of_interest(row: dict) -> str:
    """The row without what fills pages."""
    return str({name: value for name, value in row.items() if name not in ("instructions", "loops", "metadata")})


def is_in_8_bits(row: dict) -> bool:
    return not {"int8", "float8_e4m3fn"}.isdisjoint(row["dtypes"])


@pytest.mark.slow
@pytest.mark.parametrize("architecture, kind, share", PIECES, ids=lambda part: part.replace("/", "of"))
def test_machine_code(architecture, kind, share):
    rows = compile_piece(architecture, kind, share)
    assert len(rows) >= 10
    bad = [f"{'; '.join(found)}: {of_interest(row)}" for row in rows if (found := faults(row))]
    assert not bad, "\n".join(bad)
    # On the stub driver all or, where it cannot be compiled, none.
    assert len({bool(row["launched"]) for row in rows}) == 1
    for row in rows:
        # Pools and roundings in 8 bits that must not fuse ask for it where they mean it.
        if "requantize" in row["given"] or not is_in_8_bits(row):
            assert row["options"]["enable_fp_fusion"] == str("requantize" not in row["given"]), of_interest(row)
    # Full fp32 runs outside of the tensor cores where that is faster.
    wanted = NARROW.get((architecture, kind)) or TENSOR_CORE[architecture]
    assert kind == "float32" or any(row["tensor_core"] == wanted for row in rows)


PLANTED = """
import json, sys
import torch
from gpukern.conv import ConvPlan, Variant, force_plan
from gpukern.runtime import device
from gpukern.runtime.compile_only import record_launches
import gpukern.functional as F
from tests.compile.worker import describe

variant, *numbers = json.loads(sys.argv[2])
box = {"box": (1, 16, numbers[0] // 16)} if variant == "box" else {}
plan = ConvPlan(Variant(variant), *numbers, **box)
shapes = (8, 256, 28, 28), (256, 256, 3, 3)
x, w = (torch.empty(s, device="meta").half().contiguous(memory_format=torch.channels_last) for s in shapes)
with force_plan(plan), record_launches(getattr(device, sys.argv[1])) as launches:
    F.conv2d(x, w, padding=1)
print(json.dumps(describe(launches[-1])))
"""


@pytest.mark.parametrize(
    "device, plan, expected",
    [
        # A tile too large for the registers, or with too many stages for the shared memory.
        (A100, ("taps", 128, 256, 64, 4, 2), "spills"),
        (A100, ("taps", 128, 256, 64, 4, 5), "shared memory"),
        (H100, ("box", 256, 128, 64, 4, 3), "waits for wgmma"),
        (H100, ("box", 256, 128, 64, 4, 3), "(C75"),
        (H100, ("box", 128, 128, 64, 8, 8), "shared memory"),
    ],
    ids=lambda part: part if isinstance(part, str) else None,
)
def test_a_planted_bad_configuration_is_caught(device, plan, expected, run_python):
    result = run_python(PLANTED, device.name, json.dumps(plan), GPUKERN_PLANS="")
    assert result.returncode == 0, result.stderr
    assert any(expected in found for found in faults(json.loads(result.stdout)))
