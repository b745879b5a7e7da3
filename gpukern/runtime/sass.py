"""Reads the machine code of a compiled kernel: registers, spills, shared memory, and what its main loop is made of."""

from __future__ import annotations

import collections
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.compiler import CompiledKernel

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
_LABEL = re.compile(r"^(\.L_x?_?\w+):")
_TARGET = re.compile(r"(\.L_x?_?\w+)")
_USAGE = re.compile(r"REG:(\d+)\s+STACK:(\d+)")

#: wgmma on Hopper, mma.sync on every tensor-core GPU since Turing.
TENSOR_CORE = ("HGMMA", "HMMA")


@dataclass(frozen=True)
class Sass:
    """One kernel's machine code, counted.

    ``instructions`` and ``loop`` (the innermost loop with a tensor-core instruction, empty if there is none) map the
    opcode's first part to its count; ``shared_memory`` is in bytes; ``spills`` counts local loads and stores.
    """

    registers: int
    stack: int
    shared_memory: int
    instructions: collections.Counter
    loop: collections.Counter

    @property
    def spills(self) -> int:
        return self.instructions["LDL"] + self.instructions["STL"]

    @property
    def tensor_core(self) -> str | None:
        """The tensor-core instruction used, or None."""
        return next((name for name in TENSOR_CORE if self.instructions[name]), None)


def read_sass(kernel: CompiledKernel) -> Sass:
    """Disassemble ``kernel`` with the tools that Triton ships."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernel.cubin")
        Path(cubin).write_bytes(kernel.asm["cubin"])
        code = _tool("nvdisasm", "-c", cubin)
        usage = _USAGE.search(_tool("cuobjdump", "-res-usage", cubin))
    opcodes, loops = _parse(code)
    with_tensor_cores = [body for body in loops if any(op in TENSOR_CORE for op in opcodes[slice(*body)])]
    innermost = min(with_tensor_cores, key=lambda body: body[1] - body[0], default=(0, 0))
    return Sass(
        registers=int(usage[1]),
        stack=int(usage[2]),
        shared_memory=kernel.metadata.shared,
        instructions=collections.Counter(opcodes),
        loop=collections.Counter(opcodes[slice(*innermost)]),
    )


def _tool(name: str, *arguments: str) -> str:
    result = subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def _parse(code: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The opcodes in order, and each loop as the (first, one past the last) index of its instructions."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in code.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(opcodes)
        elif instruction := _INSTRUCTION.match(line):
            opcode, operands = instruction[1].split(".")[0], instruction[2]
            opcodes.append(opcode)
            target = _TARGET.search(operands) if opcode == "BRA" else None
            # A branch to a label already seen goes back: the end of a loop.
            if target and target[1] in labels and labels[target[1]] < len(opcodes) - 1:
                loops.append((labels[target[1]], len(opcodes)))
    return opcodes, loops
