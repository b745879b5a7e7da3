"""The driver that is not there refuses what the real one documents, and what was planted is found in a launch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("triton.backends.nvidia.driver")

from bench.lease import stub
from tests.compile.cache import FOLDER

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

FLOAT16, FLOAT32, INT32 = 6, 7, 3
ENCODE = """
import ctypes, json, sys
library = ctypes.CDLL(sys.argv[1])
given = json.loads(sys.argv[2])
def array(kind, values):
    return (kind * len(values))(*values)
rank = len(given["sizes"])
memory = ctypes.create_string_buffer(256)
place = (ctypes.addressof(memory) + 127) // 128 * 128 + given["shift"]
status = library.cuTensorMapEncodeTiled(
    ctypes.c_void_p(place), given["type"], rank, ctypes.c_void_p(given["address"]),
    array(ctypes.c_uint64, given["sizes"]), array(ctypes.c_uint64, given["strides"]),
    array(ctypes.c_uint32, given["box"]), array(ctypes.c_uint32, [given["step"]] * rank), 0, given["swizzle"], 2,
    given["fill"])
text = ctypes.c_char_p()
library.cuGetErrorString(status, ctypes.byref(text))
print(json.dumps([status, text.value.decode(), library.stub_maps(), library.stub_refusals()]))
"""
GOOD = {
    "type": FLOAT16, "address": 4096, "sizes": [64, 56, 56, 32], "strides": [128, 7168, 401408],
    "box": [64, 16, 8, 1], "step": 1, "swizzle": 3, "fill": 0, "shift": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def library() -> str:
    return str(stub.build(FOLDER / "stub") / "libcuda.so.1")


def encoded(library: str, **changes) -> list:
    """The status, the reason, how many maps were asked for and how many were refused."""
    command = [sys.executable, "-c", ENCODE, library, json.dumps({**GOOD, **changes})]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        # What driver 580 accepts on an H200: the stem's overlapping windows, strides in any order.
        {"sizes": [32, 112, 112], "strides": [16, 2048], "box": [32, 8, 8]},
        {"strides": [401408, 128, 7168]},
        {"type": FLOAT32, "box": [32, 16, 8, 1], "fill": 1},
        {"box": [256, 1, 1, 1], "swizzle": 0},
    ],
    ids=str,
)
def test_good_tensor_maps_are_accepted(library, changes):
    assert encoded(library, **changes) == [0, "not refused", 1, 0]


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"address": 4104}, "the tensor lies at 0x1008, no multiple of 16"),
        ({"shift": 32}, "it lies at"),
        ({"strides": [120, 7168, 401408]}, "stride 1 is 120 bytes"),
        ({"strides": [128, 7168, 1 << 40]}, "stride 3 is 1099511627776 bytes"),
        ({"strides": [128, 0, 401408]}, "stride 2 is 0 bytes"),
        ({"box": [64, 512, 1, 1]}, "box side 1 is 512"),
        ({"box": [64, 0, 1, 1]}, "box side 1 is 0"),
        ({"box": [4, 8, 1, 1]}, "box rows of 8 bytes, no multiple of 16"),
        ({"box": [128, 8, 1, 1]}, "box rows of 256 bytes under a swizzle of 128"),
        ({"box": [64, 8, 1, 1], "swizzle": 2}, "box rows of 128 bytes under a swizzle of 64"),
        ({"sizes": [64, 56, 0, 32]}, "size 2 is 0"),
        ({"sizes": [64, 56, 56, (1 << 32) + 1]}, "size 3 is 4294967297"),
        ({"sizes": [64] * 6, "strides": [128] * 5, "box": [64] * 6}, "rank 6"),
        ({"step": 9}, "element stride 0 is 9"),
        ({"type": INT32, "box": [32, 8, 1, 1], "fill": 1}, "NaN outside"),
    ],
    ids=str,
)
def test_bad_tensor_maps_are_refused(library, changes, reason):
    status, text, maps, refusals = encoded(library, **changes)
    assert status == 1 and text.startswith("tensor map: ") and reason in text
    assert (maps, refusals) == (1, 1)


LAUNCH = """
import dataclasses, json, sys
import torch
import gpukern.functional as F
from gpukern.runtime.compile_only import record_launches
from gpukern.runtime.device import H100
from tests.compile.driver import refused, the_stub
from tests.compile.worker import _metadata

what, kernel, change = json.loads(sys.argv[1])
x, w = (torch.empty(s, device="meta").half().to(memory_format=torch.channels_last)
        for s in ((8, 64, 28, 28), (64, 64, kernel, kernel)))
with record_launches(H100) as launches:
    F.conv2d(x, w, padding=kernel // 2)
launch = launches[-1]
metadata = _metadata(launch.compile())
good, bad = refused([launch], launch, metadata, the_stub()), launch
if what == "grid":
    bad = dataclasses.replace(launch, grid=tuple(change))
elif what == "metadata":
    metadata |= change
elif what == "box":
    metadata["tensordesc_meta"][0]["block_size"][-2] = change
else:
    descriptor = next(each for each in launch.arguments if hasattr(each, "block_shape"))
    descriptor.strides = [change, *descriptor.strides[1:]]
print(json.dumps([good, refused([bad], launch, metadata, the_stub()), the_stub().launches]))
"""


@pytest.mark.parametrize(
    "planted, reason",
    [
        (
            ("stride", 3, 50179),
            "tensor map: stride 3 is 100358 bytes",
        ),
        (("box", 3, 512), "is 512, not 1 to 256"),
        (("grid", 3, [1, 65536, 1]), "a grid of 1 x 65536 x 1"),
        # Triton multiplies the sides in 32 bits, and launches nothing where that is no positive number.
        (("grid", 3, [65536, 65535, 1]), "driver: no launch arrived, the grid is (65536, 65535, 1)"),
        (("metadata", 3, {"shared": 232449}), "out of resource: shared memory"),
        (("metadata", 3, {"num_warps": 64}), "out of resource: threads"),
    ],
    ids=str,
)
def test_what_was_planted_in_a_launch_is_found(planted, reason, run_python):
    ran = run_python(LAUNCH, json.dumps(planted))
    assert ran.returncode == 0, ran.stderr[-3000:]
    good, bad, launches = json.loads(ran.stdout.splitlines()[-1])
    assert good == [] and launches >= 1
    assert len(bad) == 1 and reason in bad[0]


def test_the_real_driver_never_gets_such_launches(library, run_python, tmp_path):
    """Where it was loaded first, under the same name."""
    real = tmp_path / "libcuda.so.1"
    (tmp_path / "real.c").write_text("int cuInit(unsigned flags) { return 0; }")
    options = "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"
    subprocess.run(["cc", *options, str(tmp_path / "real.c"), "-o", str(real)], check=True)
    code = """
import ctypes, sys
from pathlib import Path
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
from bench.lease.stub import Stub
Stub(Path(sys.argv[2]).parent)
"""
    ran = run_python(code, str(real), library)
    assert ran.returncode != 0 and "the real libcuda.so.1 is loaded already" in ran.stderr
