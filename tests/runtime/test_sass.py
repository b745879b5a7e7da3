"""What is counted in a kernel's machine code, on handwritten listings."""

from __future__ import annotations

import collections

import pytest

from gpukern.runtime.control_flow import parse
from gpukern.runtime.sass import Sass, kind_of, working_loops
from tests.runtime.test_control_flow import listing


def sass(*lines: str) -> Sass:
    instructions, labels = parse(listing(*lines))
    counts = collections.Counter(instruction.name for instruction in instructions)
    return Sass(32, 0, 0, counts, working_loops(instructions, labels))


HOPPER = (
    "UTMALDG.4D [UR8], [UR10]",
    "UTMALDG.4D [UR8], [UR10]",
    ".L_x_0:",
    "@P2 UTMALDG.4D [UR8], [UR10]",
    "LDG.E R4, [R2.64]",
    "LDGSTS.E.BYPASS.LTC128B.128 [R2], [R4.64]",
    "HGMMA.64x128x16.F32 R24, gdesc[UR16].tnspB, R24",
    "HGMMA.64x128x16.F32 R24, R4, gdesc[UR16], R24, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "WARPGROUP.ARRIVE",
    "UIADD3 UR4, UR4, 0x1, URZ",
    "ISETP.GE.AND P0, PT, R1, UR4, PT",
    "@P0 BRA `(.L_x_0)",
    "EXIT",
)


def test_a_loop_on_tensor_cores():
    read = sass(*HOPPER)
    (loop,) = read.loops
    assert read.tensor_core == "HGMMA" and read.main_loop is loop
    assert (loop.length, loop.register_operands, loop.waits, loop.copies, loop.copies_ahead) == (10, 1, 1, 2, 2)
    assert loop.instructions["LDG"] == 1 and loop.instructions["LDGSTS"] == 1
    assert loop.mix == {
        "tensor cores": 2,
        "asynchronous copies": 2,
        "global memory": 1,
        "predicates": 1,
        "control and barriers": 3,
        "integers and addresses": 1,
    }
    assert sum(loop.mix.values()) == loop.length


def test_every_loop_on_tensor_cores_is_found_and_the_longest_is_the_main_one():
    body = ["HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA `(.L_x_{0})"]
    longer = ["FADD R1, R1, R2", *body]
    code = [".L_x_0:", *body, ".L_x_1:", *longer, ".L_x_2:", "FFMA R1, R2, R3, R4", "@P0 BRA `(.L_x_2)", "EXIT"]
    code = [line.replace("{0}", "0" if number < 3 else "1") for number, line in enumerate(code)]
    read = sass(*code)
    assert [loop.length for loop in read.loops] == [2, 3] and read.main_loop.length == 3
    # A loop around them is no innermost one.
    around = sass(".L_x_9:", "MOV R1, R2", *code[:-1], "@P3 BRA `(.L_x_9)", "EXIT")
    assert [loop.length for loop in around.loops] == [2, 3]


def test_without_tensor_cores_the_main_loop_is_the_deepest_with_most_arithmetic():
    read = sass(
        ".L_x_0:", "LDG.E R4, [R2.64]", "FFMA R1, R2, R3, R4", "FFMA R1, R2, R3, R4", "@P0 BRA `(.L_x_0)",
        ".L_x_1:", "MOV R1, R2",
        ".L_x_2:", "FFMA R1, R2, R3, R4", "@P0 BRA `(.L_x_2)",
        ".L_x_3:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2", "@!P0 BRA `(.L_x_3)",
        "@P0 BRA `(.L_x_1)", "EXIT",
    )  # fmt: skip
    assert read.tensor_core is None
    assert [(loop.length, loop.depth) for loop in read.loops] == [(4, 0), (2, 1)]  # and not the wait
    assert read.main_loop.depth == 1


def test_no_loop_at_all():
    assert sass("FADD R1, R1, R2", "EXIT").main_loop is None


def test_spills_are_loads_and_stores_of_local_memory():
    assert sass("STL [R1], R2", "LDL R2, [R1]", "LDL.64 R4, [R1]", "EXIT").spills == 3


@pytest.mark.parametrize(
    "name, kind",
    [
        ("UTCHMMA", "tensor cores"),
        ("UTMASTG", "asynchronous copies"),
        ("DEPBAR", "asynchronous copies"),
        ("LDSM", "shared memory"),
        ("LDG", "global memory"),
        ("MUFU", "floating point"),
        ("UISETP", "predicates"),
        ("BAR", "control and barriers"),
        ("IMAD", "integers and addresses"),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind
