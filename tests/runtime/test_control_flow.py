"""Loops found in handwritten listings, in the form in which nvdisasm prints them."""

from __future__ import annotations

import pytest

from gpukern.runtime.control_flow import Body, loops, parse, shortest_pass


def listing(*lines: str) -> str:
    """Numbered instructions; a line that ends with a colon is a label."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * number:04x}*/  {line} ;" for number, line in enumerate(lines)
    )


def found(*lines: str) -> list[tuple[list[str], int]]:
    """The names of the instructions of each loop, and its depth."""
    instructions, labels = parse(listing(*lines))
    return [([instructions[i].name for i in body.indices], body.depth) for body in loops(instructions, labels)]


def test_parse_reads_opcodes_operands_and_predicates():
    instructions, labels = parse(
        listing(
            "@!P0 BRA `(.L_x_3)",
            "@UP1 UIADD3 UR4, UR4, 0x1, URZ",
            ".L_x_3:",
            "HGMMA.64x128x16.F32 R24, gdesc[UR16], R24, gsb0",
        )
    )
    assert [(i.opcode, i.name, i.predicated) for i in instructions] == [
        ("BRA", "BRA", True),
        ("UIADD3", "UIADD3", True),
        ("HGMMA.64x128x16.F32", "HGMMA", False),
    ]
    assert "gdesc[UR16]" in instructions[2].operands and labels == {".L_x_3": 2}


def test_straight_code_has_no_loop():
    assert found("MOV R1, R2", "EXIT", ".L_x_0:", "BRA `(.L_x_0)") == []  # what pads a kernel is never reached


def test_nested_loops():
    code = [
        "MOV R1, R2",
        ".L_x_0:",
        "IADD3 R1, R1, 0x1, RZ",
        ".L_x_1:",
        "FFMA R3, R3, R4, R5",
        "@P0 BRA `(.L_x_1)",
        "STG.E [R6], R3",
        "@P1 BRA `(.L_x_0)",
        "EXIT",
    ]
    assert found(*code) == [(["IADD3", "FFMA", "BRA", "STG", "BRA"], 0), (["FFMA", "BRA"], 1)]


@pytest.mark.parametrize("condition", ["@P0 BRA `(.L_x_1)", "BRA.U UP0, `(.L_x_1)", "BRA P0, `(.L_x_1)"])
def test_a_conditional_branch_may_fall_through(condition):
    assert found("MOV R1, R2", ".L_x_1:", "FADD R1, R1, R2", condition, "EXIT") == [(["FADD", "BRA"], 0)]


def test_a_slow_path_behind_the_end_makes_no_loop_of_its_own():
    """Where a wait fails, the kernel tries again behind its end, and jumps back into the middle of the main loop."""
    main = [
        ".L_x_0:",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2",
        "@!P0 BRA `(.L_x_2)",
        ".L_x_1:",
        "HGMMA.64x128x16.F32 R24, gdesc[UR16], R24, gsb0",
        "@P1 BRA `(.L_x_0)",
        "EXIT",
    ]
    slow = [".L_x_2:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2", "@!P0 BRA `(.L_x_2)", "BRA `(.L_x_1)"]
    # The wait that tries again is a loop in the loop; what follows the main loop's jump back is not counted in it.
    assert found(*main, *slow) == [(["SYNCS", "BRA", "HGMMA", "BRA"], 0), (["SYNCS", "BRA"], 0)]


def test_an_indirect_jump_reaches_the_targets_that_are_listed():
    code = [
        'BRX R2 -0x1e0 (*"BRANCH_TARGETS .L_x_0,.L_x_1"*)',
        ".L_x_0:",
        "FADD R1, R1, R2",
        "@P0 BRA `(.L_x_0)",
        "EXIT",
        ".L_x_1:",
        "FMUL R1, R1, R2",
        "@P0 BRA `(.L_x_1)",
        "EXIT",
    ]
    assert found(*code) == [(["FADD", "BRA"], 0), (["FMUL", "BRA"], 0)]


def test_two_jumps_back_to_one_place_are_one_loop():
    code = [".L_x_0:", "FADD R1, R1, R2", "@P0 BRA `(.L_x_0)", "FMUL R1, R1, R2", "@P1 BRA `(.L_x_0)", "EXIT"]
    assert found(*code) == [(["FADD", "BRA", "FMUL", "BRA"], 0)]


def test_the_shortest_pass_leaves_out_what_is_rare():
    code = [
        "MOV R1, R2",
        ".L_x_0:",
        "LDG.E R3, [R4]",
        "@!P0 BRA `(.L_x_1)",
        "MUFU.RCP R3, R3",
        "FMUL R3, R3, R5",
        ".L_x_1:",
        "STG.E [R4], R3",
        "@P1 BRA `(.L_x_0)",
        "EXIT",
    ]
    instructions, labels = parse(listing(*code))
    (body,) = loops(instructions, labels)
    assert len(body.indices) == 6 and shortest_pass(instructions, labels, body) == 4


def test_what_leads_nowhere_is_no_loop():
    instructions, labels = parse(listing("MOV R1, R2", "EXIT"))
    with pytest.raises(ValueError, match="not a loop"):
        shortest_pass(instructions, labels, Body((0, 1), 0))
