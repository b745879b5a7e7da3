"""Recording launches and compiling them without a GPU, each in a process of its own: this one emulates."""

from __future__ import annotations

import json

import pytest

COMMON = """
import json
import torch
from gpukern.runtime.compile_only import record_launches
from gpukern.runtime.descriptor import Described
from gpukern.runtime.device import A100, B200, H100, L4
from gpukern.runtime.sass import ptxas_log, read_sass, serialisation_warnings
from tests.compile import small_kernels as k

def tensor(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="meta")

def double(size=64, x=None, pair=None, block=64):
    pair = pair or (tensor(1), 3)
    with record_launches(H100) as launches:
        k.double_kernel[(1,)](tensor(size) if x is None else x, pair, tensor(size), size, BLOCK=block, num_warps=4)
    return launches[0]

def copy_box(block, shape=(64, 64), dtype=torch.float16):
    whole = Described(shape, (shape[1], 1), block)
    with record_launches(H100) as launches:
        k.copy_box_kernel[(1,)](whole.of(tensor(*shape, dtype=dtype)), whole.of(tensor(*shape, dtype=dtype)), 5)
    return launches[0]
"""


@pytest.fixture
def run(run_python):
    def run(code: str) -> object:
        result = run_python(COMMON + code)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return run


def test_what_a_launch_says(run):
    said = run(
        """
a, b = double(), copy_box((16, 64))
print(json.dumps([[x.kernel, x.grid, x.dtypes, x.device.name] for x in (a, b)]))
"""
    )
    assert said == [
        ["double_kernel", [1], ["float16", "float16", "float16"], "H100"],
        ["copy_box_kernel", [1], ["float16", "float16"], "H100"],
    ]


def test_keys_differ_exactly_where_the_compiled_code_does(run):
    alike, different = run(
        """
f32 = tensor(64, dtype=torch.float32)
print(json.dumps([
    [a.key == b.key for a, b in (
        (double(64), double(128)),                                  # both multiples of 16
        (copy_box((16, 64)), copy_box((16, 64), shape=(128, 96))),  # sizes are no part of a descriptor's type
    )],
    [a.key == b.key for a, b in (
        (double(64), double(65)),
        (double(64), double(1)),
        (double(64), double(2**33)),
        (double(), double(x=f32)),
        (double(), double(pair=(tensor(1), 16))),
        (double(), double(pair=(f32, 3))),
        (double(), double(block=128)),
        (copy_box((16, 64)), copy_box((8, 64))),
        (copy_box((16, 64)), copy_box((16, 64), dtype=torch.bfloat16)),
    )],
]))
"""
    )
    assert all(alike) and not any(different)


def test_compile_time_arguments_by_position_are_the_same_launch(run):
    """As convolutions hand them on: what is recorded and compiled has them by name all the same."""
    same, options, count, refusal = run(
        """
from gpukern.runtime.launcher import compile_time, launch
given = {"num_warps": 4, "BLOCK": 64}
arguments = (tensor(64), (tensor(1), 3), tensor(64), 64)
with record_launches(H100) as launches:
    for options in (given, compile_time(k.double_kernel, given)):
        launch(k.double_kernel, (1,), arguments[0].device, arguments, options)
try:
    compile_time(k.double_kernel, {"size": 64, "num_warps": 4})
except ValueError as error:
    refusal = str(error)
a, b = launches
print(json.dumps([a.fingerprint == b.fingerprint, [a.options, b.options], len(b.arguments), refusal]))
"""
    )
    assert same and options == [{"num_warps": 4, "BLOCK": 64, "enable_fp_fusion": True}] * 2 and count == 4
    assert "double_kernel" in refusal


def test_the_fingerprint_knows_the_architecture(run):
    prints = run(
        """
from dataclasses import replace
launch = double()
print(json.dumps([replace(launch, device=device).fingerprint for device in (H100, H100, A100, L4)]))
"""
    )
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_the_fingerprint_knows_the_source_and_what_it_calls(run_python, tmp_path):
    source = """
import triton, triton.language as tl

@triton.jit
def part(x):
    return x + 1

@triton.jit
def kernel(x_ptr):
    tl.store(x_ptr, part(tl.load(x_ptr)))
"""
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import kernels
from gpukern.runtime.compile_only import record_launches
from gpukern.runtime.device import H100
with record_launches(H100) as launches:
    kernels.kernel[(1,)](torch.empty(1, device="meta"))
print(launches[0].fingerprint)
"""

    def fingerprint(text: str) -> str:
        (tmp_path / "kernels.py").write_text(text)
        result = run_python(code, str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
        assert result.returncode == 0, result.stderr
        return result.stdout

    first = fingerprint(source)
    assert first == fingerprint(source)
    assert first != fingerprint(source.replace("x + 1", "x + 2"))


@pytest.mark.parametrize("device, opcode", [("H100", "UTMALDG"), ("B200", "UTMALDG"), ("A100", "LDG")])
def test_descriptors_compile(run, device, opcode):
    names = run(
        f"""
whole = Described((64, 64), (64, 1), (16, 64))
with record_launches({device}) as launches:
    k.copy_box_kernel[(1,)](whole.of(tensor(64, 64)), whole.of(tensor(64, 64)), 5)
print(json.dumps(list(read_sass(launches[0].compile()).instructions)))
"""
    )
    assert opcode in names


def test_gluon_kernels_are_recorded_and_compile(run):
    read = run(
        """
with record_launches(H100) as launches:
    k.copy_gluon_kernel[(1,)](tensor(128), tensor(128), BLOCK=128, num_warps=4)
sass = read_sass(launches[0].compile())
print(json.dumps([launches[0].dtypes, sass.instructions["STG"], sass.loops]))
"""
    )
    assert read == [["float16", "float16"], 1, []]


def test_the_log_of_ptxas_comes_with_the_compilation_or_from_a_run_of_its_own(run_python, tmp_path):
    """A wide tile on few warps does not leave wgmma the registers to overlap."""
    result = run_python(
        COMMON
        + """
from gpukern.conv import ConvPlan, Variant, force_plan
import gpukern.functional as F
wide = ConvPlan(Variant.TAPS, 128, 256, 64, num_warps=4, num_stages=3)
x, w = (tensor(*shape).contiguous(memory_format=torch.channels_last) for shape in ((8, 256, 28, 28), (256, 256, 3, 3)))
with force_plan(wide), record_launches(H100) as launches:
    F.conv2d(x, w, padding=1)
with ptxas_log() as log:
    compiled = launches[-1].compile()
print(json.dumps([serialisation_warnings(compiled, log.getvalue()), read_sass(compiled, warnings=True).warnings,
                  read_sass(compiled).warnings]))
""",
        GPUKERN_PLANS="",
        TRITON_CACHE_DIR=str(tmp_path),
    )
    assert result.returncode == 0, result.stderr
    logged, asked, not_asked = json.loads(result.stdout)
    assert logged == asked and not_asked is None
    assert any("(C75" in line for line in logged)


def test_no_recording_where_the_interpreter_is_in_place(run_python):
    result = run_python(COMMON + "double()", GPUKERN_EMULATE="1")
    assert result.returncode != 0 and "another process" in result.stderr


def test_a_receiver_gets_the_launches_and_nothing_holds_their_tensors(run):
    kernels, kept, alive = run(
        """
import weakref
kernels, tensors = [], []
with record_launches(H100, lambda launch: kernels.append(launch.kernel)) as launches:
    x, y = tensor(64), tensor(64)
    k.double_kernel[(1,)](x, (tensor(1), 3), y, 64, BLOCK=64, num_warps=4)
    gone = weakref.ref(y)
    del y
    alive = gone() is not None
print(json.dumps([kernels, len(launches), alive]))
"""
    )
    assert (kernels, kept, alive) == (["double_kernel"], 0, False)


def test_first_representation_has_functions_inlined_and_arguments_decided(run):
    small, large, boxes, in_gluon = run(
        """
with record_launches(H100) as launches:
    k.copy_gluon_kernel[(1,)](tensor(128), tensor(128), BLOCK=128)
codes = [double(block=64), double(block=128), copy_box((16, 64)), launches[0]]
print(json.dumps([code.first_ir() for code in codes]))
"""
    )
    assert "tensor<64xf16>" in small and "tensor<128xf16>" in large and "tt.call" not in small + large
    assert "tt.descriptor_store" in boxes and "ttg.num-warps" in in_gluon
