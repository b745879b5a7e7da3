"""Analysis of a compiled kernel's machine code: registers, spills, shared memory, and its main loop's instructions."""

from __future__ import annotations

import collections
import contextlib
import io
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.compiler.compiler import make_backend

from gpukern.runtime.control_flow import Body, Instruction, loops, parse

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_USAGE = re.compile(r"REG:(\d+)\s+STACK:(\d+)")

#: Matrix products: wgmma on Hopper, tcgen05.mma on the data-centre Blackwells, mma.sync on every GPU since Turing; of
#: halves and TF32 (H), whole numbers of 8 bits (I), and floats of 8 bits (Q).
TENSOR_CORE = ("HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA", "HMMA", "IMMA", "QMMA")
_FROM_SHARED_MEMORY = ("HGMMA", "IGMMA", "QGMMA")
#: Asynchronous copies from global to shared memory: TMA and cp.async.
ASYNCHRONOUS_COPIES = ("UTMALDG", "LDGSTS")

#: Kinds of instructions, by the first part of their opcode. All others compute integers and addresses.
_KINDS = {
    "tensor cores": "HGMMA IGMMA QGMMA HMMA IMMA QMMA LDTM STTM",
    "asynchronous copies": "LDGSTS LDGDEPBAR DEPBAR UBLKCP",
    "shared memory": "LDS STS LDSM STSM ATOMS MOVM",
    "global memory": "LDG STG LD ST RED ATOM ATOMG CCTL",
    "local memory": "LDL STL",
    "floating point": "FADD FMUL FFMA FSETP FSEL FMNMX FCHK MUFU HADD2 HFMA2 HMUL2 HSETP2 HSET2 HMNMX2 F2F F2FP F2I "
    "I2F I2FP FRND DADD DMUL DFMA DSETP",
    "predicates": "ISETP PLOP3 P2R R2P PSETP VOTE VOTEU UISETP UPLOP3 UP2UR R2UP USETP",
    "control and barriers": "BRA BRX BSSY BSYNC BREAK BMOV CALL RET EXIT JMP NOP YIELD NANOSLEEP BAR SYNCS WARPSYNC "
    "WARPGROUP MEMBAR FENCE ERRBAR ELECT ACQBULK USETMAXREG CREDUX",
}
_OTHERS = "integers and addresses"
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names.split()}


@dataclass(frozen=True)
class Loop:
    """One iteration of an innermost loop, counted.

    ``instructions`` maps the opcodes' first parts to their counts. ``register_operands`` counts the wgmma that take
    their first operand from registers, ``waits`` the waits for earlier wgmma. ``copies_ahead`` are the asynchronous
    copies in the code before the loop: a loop that fetches in advance has those of its first iterations there.
    """

    instructions: collections.Counter
    register_operands: int
    waits: int
    copies_ahead: int
    depth: int

    @property
    def length(self) -> int:
        return self.instructions.total()

    @property
    def copies(self) -> int:
        return sum(self.instructions[name] for name in ASYNCHRONOUS_COPIES)

    @property
    def mix(self) -> dict[str, int]:
        """Return the number of instructions of each kind, without those that do not occur."""
        kinds: collections.Counter[str] = collections.Counter()
        for name, count in self.instructions.items():
            kinds[kind_of(name)] += count
        return {kind: kinds[kind] for kind in (*_KINDS, _OTHERS) if kinds[kind]}


@dataclass(frozen=True)
class Sass:
    """One kernel's machine code, counted.

    ``instructions`` maps the opcodes' first parts to their counts; ``shared_memory`` and ``stack`` are in bytes.
    ``loops`` are the innermost loops that multiply on tensor cores; in a kernel without, all innermost loops that
    compute or touch memory. ``warnings`` are ptxas' about products that it serializes, None if not requested.
    """

    registers: int
    stack: int
    shared_memory: int
    instructions: collections.Counter
    loops: tuple[Loop, ...]
    warnings: tuple[str, ...] | None = None

    @property
    def spills(self) -> int:
        """Loads from and stores to local memory."""
        return self.instructions["LDL"] + self.instructions["STL"]

    @property
    def tensor_core(self) -> str | None:
        """The tensor-core instruction used, or None."""
        return next((name for name in TENSOR_CORE if self.instructions[name]), None)

    @property
    def main_loop(self) -> Loop | None:
        """The loop that takes the time: that on tensor cores, else the most deeply nested; ties go to the longest."""
        if self.tensor_core:
            return max(self.loops, key=lambda loop: loop.length, default=None)
        return max(self.loops, key=lambda loop: (loop.depth, _arithmetic(loop), loop.length), default=None)


def kind_of(name: str) -> str:
    """Return the kind of instructions whose opcode's first part is ``name``."""
    if name.startswith("UTMA"):
        return "asynchronous copies"
    if name.startswith("UTC"):
        return "tensor cores"
    return _KIND_OF.get(name, _OTHERS)


def resources(kernel: CompiledKernel) -> tuple[int, int]:
    """Return (registers of a thread, bytes of its stack), in milliseconds. A kernel without a stack has no spills."""
    with _on_disk(kernel) as cubin:
        usage = _USAGE.search(_tool("cuobjdump", "-res-usage", cubin))
    assert usage is not None, "cuobjdump lists the resources of every kernel"
    return int(usage[1]), int(usage[2])


def read_sass(kernel: CompiledKernel, *, warnings: bool = False) -> Sass:
    """Disassemble ``kernel`` with the tools that Triton ships. ``warnings`` runs ptxas again, which takes its time."""
    with _on_disk(kernel) as cubin:
        code = _tool("nvdisasm", "-c", cubin)
    registers, stack = resources(kernel)
    instructions, labels = parse(code)
    return Sass(
        registers=registers,
        stack=stack,
        shared_memory=kernel.metadata.shared,
        instructions=collections.Counter(instruction.name for instruction in instructions),
        loops=working_loops(instructions, labels),
        warnings=serialisation_warnings(kernel) if warnings else None,
    )


def working_loops(instructions: list[Instruction], labels: dict[str, int]) -> tuple[Loop, ...]:
    """The loops of :attr:`Sass.loops`, in the order of the code."""
    bodies = loops(instructions, labels)
    multiply = [body for body in bodies if _has(instructions, body, _multiplies)]
    # A wait that retries is a loop too, but does no work.
    working = multiply or [body for body in bodies if _has(instructions, body, _works)]
    inner = [body for body in working if not any(other.within(body) for other in working)]
    repeated = {index for body in inner for index in body.indices}
    return tuple(_loop(instructions, body, repeated) for body in inner)


def _loop(instructions: list[Instruction], body: Body, repeated: set[int]) -> Loop:
    inside = [instructions[index] for index in body.indices]
    before = (instructions[index] for index in range(body.indices[0]) if index not in repeated)
    return Loop(
        instructions=collections.Counter(instruction.name for instruction in inside),
        register_operands=sum(_takes_registers(instruction) for instruction in inside),
        waits=sum(instruction.opcode.startswith("WARPGROUP.DEPBAR") for instruction in inside),
        copies_ahead=sum(instruction.name in ASYNCHRONOUS_COPIES for instruction in before),
        depth=body.depth,
    )


def _has(instructions: list[Instruction], body: Body, test: Callable[[Instruction], bool]) -> bool:
    return any(test(instructions[index]) for index in body.indices)


def _multiplies(instruction: Instruction) -> bool:
    return instruction.name in TENSOR_CORE


def _works(instruction: Instruction) -> bool:
    return kind_of(instruction.name) in ("floating point", "global memory", "shared memory", "asynchronous copies")


def _takes_registers(instruction: Instruction) -> bool:
    """Whether the first factor of a wgmma is not described by a ``gdesc``, the address of shared memory."""
    return instruction.name in _FROM_SHARED_MEMORY and "gdesc" not in instruction.operands.split(",")[1]


def _arithmetic(loop: Loop) -> int:
    return loop.mix.get("floating point", 0)


@contextlib.contextmanager
def ptxas_log() -> Iterator[io.StringIO]:
    """Collect ptxas' output for the kernels that Triton compiles inside the block."""
    with knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        knobs.nvidia.dump_ptxas_log = True
        yield log


def serialisation_warnings(kernel: CompiledKernel, log: str = "") -> tuple[str, ...]:
    """Return ptxas' warnings about wgmma that it serializes: (C7510) and its neighbours.

    ``log`` is the output that :func:`ptxas_log` collected at compilation; without it, ptxas runs again, with Triton's
    own options.
    """
    if not log:
        target = kernel.metadata.target
        with ptxas_log() as again:
            make_backend(target).make_cubin(kernel.asm["ptx"], {}, kernel.metadata, target.arch)
        log = again.getvalue()
    return tuple(dict.fromkeys(re.findall(r"\(C75\d+\).*", log)))


@contextlib.contextmanager
def _on_disk(kernel: CompiledKernel) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        yield str(cubin)


def _tool(name: str, *arguments: str) -> str:
    result = subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr
