"""What counts as a fault of a compiled kernel, on made-up rows."""

from __future__ import annotations

import copy

import pytest

from tests.compile.faults import faults

LOOP = {
    "length": 99,
    "instructions": {"HGMMA": 4, "UTMALDG": 2},
    "register_operands": 0,
    "waits": 1,
    "copies": 2,
    "copies_ahead": 4,
}
BOX = {
    "kernel": "conv2d_box_kernel",
    "triton": "3.7.1",
    "capability": [9, 0],
    "dtypes": ["float16", "float16", "float32"],
    "descriptors": True,
    "options": {"PRECISION": "ieee", "num_stages": "3"},
    "limit": 1000,
    "registers": 90,
    "stack": 0,
    "spills": 0,
    "shared_memory": 1000,
    "warnings": [],
    "tensor_core": "HGMMA",
    "instructions": {"HGMMA": 4, "UTMALDG": 6},
    "loops": [LOOP],
}
GATHER = {
    **BOX,
    "kernel": "conv2d_gather_kernel",
    "descriptors": False,
    "options": {"PRECISION": "ieee", "num_stages": "3", "VARIANT": "taps", "SOURCE_ALIGN": "8", "FILTER_ALIGN": "16"},
    "tensor_core": "HMMA",
    "instructions": {"HMMA": 16, "LDGSTS": 6},
    "loops": [{**LOOP, "instructions": {"HMMA": 16, "LDGSTS": 2, "LDSM": 6}, "waits": 0}],
}
GEMM = {**BOX, "kernel": "conv2d_gemm_kernel"}
BYTES = {**BOX, "dtypes": ["int8", "int8", "float32"], "tensor_core": "IGMMA"}
BYTES["loops"] = [{**LOOP, "instructions": {"IGMMA": 4, "UTMALDG": 2}}]
MANY = {"HGMMA": 4, "UTMALDG": 6, "FADD": 90}
IN_LOOP = {"loop__instructions": {"HGMMA": 4, "LDL": 1}}
DEPTHWISE = {
    **BOX,
    "kernel": "conv2d_depthwise_kernel",
    "descriptors": False,
    "options": {},
    "tensor_core": None,
    "instructions": {"FFMA": 200, **IN_LOOP["loop__instructions"]},
    "loops": [{**LOOP, "length": 100, "instructions": {"FFMA": 97, "LDL": 1, "STL": 1}}],
}
LONG = {"FFMA": 998, "LDL": 1, "STL": 1}
POOL = {
    "kernel": "max_pool2d_kernel",
    "triton": "3.7.1",
    "capability": [9, 0],
    "dtypes": ["float16"],
    "descriptors": False,
    "options": {},
    "limit": 1000,
    "registers": 32,
    "stack": 0,
    "shared_memory": 0,
    "warnings": [],
    "tensor_core": None,
}


def changed(row: dict, **changes) -> dict:
    """``loop__name`` changes the loop, ``options__name`` the options, ``name`` the row."""
    row = copy.deepcopy(row)
    for name, value in changes.items():
        where, _, inner = name.rpartition("__")
        place = {"": row, "loop": row.get("loops", [{}])[0], "options": row["options"]}[where]
        place[inner] = value
    return row


@pytest.mark.parametrize("row", [BOX, GATHER, POOL], ids=lambda row: row["kernel"])
def test_good_kernels_have_none(row):
    assert faults(row) == []
    assert faults(row | {"stack": 8, "spills": 0}) == [], "nothing touches it"


@pytest.mark.parametrize(
    "row, changes, expected",
    [
        (POOL, {"error": "CompilationError"}, "does not compile"),
        (POOL, {"stack": 8, "spills": 2}, "spills"),
        (POOL, {"shared_memory": 1001}, "shared memory"),
        (BOX, {"tensor_core": None}, "no tensor-core"),
        (BOX, {"warnings": ["(C7510) Potential Performance Loss"]}, "(C7510)"),
        (BOX, {"instructions": {"HGMMA": 4}}, "copy engine"),
        (BOX, {"loop__register_operands": 4}, "from registers"),
        (BOX, {"loop__waits": 2}, "2 waits"),
        (BOX, {"loop__length": 131}, "131 instructions"),
        (BOX, {"loop__copies_ahead": 2}, "2 copies before"),
        (BOX, {"loop__copies": 0}, "without asynchronous copies"),
        (BOX, {"loop__instructions": {"LDSM": 1}}, "LDSM"),
        (BOX, {"loop__instructions": {"LDG": 1}}, "synchronous LDG"),
        (BOX, {"dtypes": ["float32"], "options__PRECISION": "tf32", "loop__length": 156}, "156 instructions"),
        (BOX, {"options__PRECISION": "tf32x3", "loop__waits": 4}, "4 waits"),
        (BOX, {"capability": [10, 0], "stack": 8, "spills": 2, "loop__instructions": {"LDL": 1}}, "spills"),
        # Few of many instructions, but not with every Triton, not in a loop, and not more.
        (BOX, {"stack": 8, "spills": 2, "instructions": MANY}, "spills"),
        (BOX, {"triton": "3.9.0", "stack": 8, "spills": 3, "instructions": MANY}, "spills"),
        (BOX, {"triton": "3.9.0", "stack": 8, "spills": 2, "instructions": MANY, **IN_LOOP}, "spills"),
        (DEPTHWISE, {"stack": 8, "spills": 2, "instructions": LONG}, "spills"),
        (DEPTHWISE, {"stack": 8, "spills": 5, "instructions": LONG, "loop__instructions": {"FFMA": 97}}, "spills"),
        (BOX, {"stack": 8, "spills": 2, "instructions": {**LONG, "UTMALDG": 6}}, "spills"),
        (DEPTHWISE, {"triton": "3.9.0", "stack": 8, "spills": 2, "loop__instructions": {"LDL": 3}}, "spills"),
        (BOX, {"capability": [12, 0], "stack": 8, "spills": 3, "instructions": MANY}, "spills"),
        (GEMM, {"loop__length": 103, "loop__instructions": {"HGMMA": 8}}, "103 instructions"),
        (GEMM, {"triton": "3.9.0", "loop__length": 103}, "103 instructions"),
        (GEMM, {"triton": "3.9.0", "loop__length": 104, "loop__instructions": {"HGMMA": 8}}, "104 instructions"),
        (BYTES, {"tensor_core": "HGMMA"}, "HGMMA for operands of 8 bits"),
        (BYTES, {"loop__instructions": {"IGMMA": 4, "I2F": 1}}, "I2F in the main loop"),
        (BYTES, {"loop__register_operands": 4}, "from registers"),
        (BYTES, {"loop__waits": 2}, "2 waits"),
        (GATHER, {"tensor_core": None}, "no tensor-core"),
        (GATHER, {"loop__copies": 0}, "without asynchronous copies"),
        (GATHER, {"loop__copies_ahead": 0}, "0 copies before"),
    ],
    ids=str,
)
def test_each_fault_is_named(row, changes, expected):
    found = faults(changed(row, **changes))
    assert len(found) == 1 and expected in found[0]


@pytest.mark.parametrize(
    "row, changes",
    [
        # Full fp32 is no work for tensor cores, and neither is what is multiplied element by element.
        (GATHER, {"dtypes": ["float32"], "tensor_core": None, "loops": []}),
        (GATHER, {"options__VARIANT": "direct", "tensor_core": None, "loops": []}),
        # Single channels cannot be copied asynchronously, and those of flat sums are gathered one by one.
        (GATHER, {"options__SOURCE_ALIGN": "1", "loop__copies": 0, "loop__copies_ahead": 0}),
        (GATHER, {"options__VARIANT": "flat", "loop__copies": 0, "loop__copies_ahead": 0}),
        # Operands of three products pass through registers.
        (BOX, {"dtypes": ["float32"], "options__PRECISION": "tf32x3", "loop__register_operands": 4, "loop__waits": 3}),
        (BOX, {"dtypes": ["float32"], "options__PRECISION": "tf32", "loop__length": 155}),
        # Blackwell keeps its sums elsewhere.
        (BOX, {"capability": [10, 0], "stack": 8, "spills": 2}),
        # ptxas of CUDA 13.4 spills a little outside of loops, and so do others for sm_120.
        (BOX, {"triton": "3.9.0", "stack": 8, "spills": 2, "instructions": MANY}),
        (BOX, {"capability": [12, 0], "stack": 8, "spills": 2, "instructions": MANY}),
        (DEPTHWISE, {"triton": "3.9.0", "stack": 8, "spills": 2}),
        # Two registers for the tail of a long kernel.
        (DEPTHWISE, {"stack": 8, "spills": 4, "instructions": LONG, "loop__instructions": {"FFMA": 97}}),
        (GEMM, {"triton": "3.10.1", "loop__length": 103, "loop__instructions": {"HGMMA": 8}}),
        # A sum over a single step has no loop left.
        (BOX, {"loops": []}),
        # Of a warp-specialised kernel another warp copies.
        (BOX, {"options": {"BUFFERS": "4"}, "loop__copies": 0, "loop__copies_ahead": 0}),
    ],
    ids=str,
)
def test_what_is_no_fault(row, changes):
    assert faults(changed(row, **changes)) == []
