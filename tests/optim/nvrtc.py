"""Compiles CUDA C++ to machine code by NVRTC as its wheel has it, and counts what came out. Needs no GPU."""

from __future__ import annotations

import collections
import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import triton

from gpukern.runtime import control_flow

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_FOLDER = Path(__file__).resolve().parents[2] / ".cache" / "compile" / "optim"
_USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_KERNEL = re.compile(r"^\s*\.section\s+\.text\.(\w+)", re.MULTILINE)


@dataclass(frozen=True)
class Kernel:
    """``instructions`` counts opcodes in full: "LDG.E.128", ...

    ``run``: the fewest of them for the elements that a thread takes at once, where all tensors are aligned.
    """

    registers: int
    stack: int
    shared_memory: int
    run: int = 0
    instructions: dict[str, int] = field(default_factory=dict)

    def count(self, *parts: str) -> int:
        """Instructions in whose opcode all these parts are, the first of them at its beginning."""
        return sum(
            number
            for opcode, number in self.instructions.items()
            if opcode.split(".")[0] == parts[0] and set(parts) <= set(opcode.split("."))
        )


class CompileError(Exception):
    """What NVRTC says of a text that it does not take."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """Of the wheel for CUDA 12, else of that for CUDA 13; None where neither is installed."""
    for package in ("nvidia.cuda_nvrtc", "nvidia.cu13"):
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            continue
        folders = [Path(place, "lib") for place in found.submodule_search_locations] if found else []
        for path in (path for folder in folders for path in folder.glob("libnvrtc.so.*")):
            # It looks for its other half by name alone.
            for half in path.parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(half), mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(path))
    return None


def compile_text(text: str, architecture: str, options: Sequence[str]) -> bytes:
    """Machine code for "sm_90", say."""
    return _compile(text, architecture, options, "CUBIN")


def ptx(text: str, architecture: str, options: Sequence[str]) -> str:
    """What the machine code is made from."""
    return _compile(text, architecture, options, "PTX").decode()


def _compile(text: str, architecture: str, options: Sequence[str], wanted: str) -> bytes:
    nvrtc, program = library(), ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None)
    try:
        given = [option.encode() for option in (f"-arch={architecture}", *options)]
        failed = nvrtc.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
        if failed:
            raise CompileError(_output(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode())
        return _output(getattr(nvrtc, f"nvrtcGet{wanted}Size"), getattr(nvrtc, f"nvrtcGet{wanted}"), program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _output(size_of, get, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    memory = ctypes.create_string_buffer(size.value)
    get(program, memory)
    return memory.raw


def read(cubin: bytes) -> dict[str, Kernel]:
    """Each kernel by its name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernels.cubin")
        path.write_bytes(cubin)
        usage = _USAGE.findall(_tool("cuobjdump", "-res-usage", str(path)))
        code = _KERNEL.split(_tool("nvdisasm", "-ndf", "-c", str(path)))[1:]
    listings = dict(zip(code[::2], code[1::2], strict=True))
    parsed = {name: control_flow.parse(listing) for name, listing in listings.items()}
    return {name: Kernel(*map(int, numbers), _run(*parsed[name]), _opcodes(*parsed[name])) for name, *numbers in usage}


def _opcodes(instructions: list[control_flow.Instruction], _: dict[str, int]) -> dict[str, int]:
    return dict(collections.Counter(instruction.opcode for instruction in instructions))


def _run(instructions: list[control_flow.Instruction], labels: dict[str, int]) -> int:
    """Of the loops with loads of 16 bytes that with the fewest instructions."""
    bodies = control_flow.loops(instructions, labels)
    wide = [body for body in bodies if any(instructions[i].opcode.startswith("LDG.E.128") for i in body.indices)]
    return min((control_flow.shortest_pass(instructions, labels, body) for body in wide), default=0)


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def kernels(text: str, architecture: str, options: Sequence[str]) -> dict[str, Kernel]:
    """Those of ``text``, compiled and read once: kept on disk by a hash of all that they depend on."""
    version = [ctypes.c_int(), ctypes.c_int()]
    library().nvrtcVersion(*map(ctypes.byref, version))
    parts = (text, architecture, *options, *(str(v.value) for v in version), triton.__version__, _reader())
    path = _FOLDER / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}.json"
    try:
        return {name: Kernel(**row) for name, row in json.loads(path.read_text()).items()}
    except (FileNotFoundError, json.JSONDecodeError):
        pass
    found = read(compile_text(text, architecture, options))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps({name: asdict(kernel) for name, kernel in found.items()}))
    unfinished.replace(path)
    return found


@functools.cache
def _reader() -> str:
    return "".join(Path(file).read_text(encoding="utf-8") for file in (__file__, control_flow.__file__))
