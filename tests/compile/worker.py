"""Compiles a share of the launches for one architecture and prints what the machine code is made of, a JSON line each.

    python -m tests.compile.worker sm_90 float16 [--every] [--share 0/2] [--cache FOLDER]

Run without ``GPUKERN_EMULATE``: the interpreter takes the compiler's place. ``--every`` compiles every distinct launch
of the gate's architectures and layouts, not one for each configuration.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import triton
from triton.compiler import CompiledKernel

from gpukern.runtime import sass
from gpukern.runtime.compile_only import Launch
from gpukern.runtime.sass import Loop
from tests.compile.cache import FOLDER, Rows, Selections
from tests.compile.configurations import Compilation, every_one, of_each_configuration
from tests.compile.driver import refused, the_stub


def describe(launch: Launch) -> dict:
    """What :mod:`tests.compile.faults` judges.

    Only products on tensor cores are disassembled, which takes time, and what has a stack: whether anything touches it.
    """
    names = launch.function.arg_names
    row = {
        "kernel": launch.kernel,
        "triton": triton.__version__,
        "capability": launch.device.compute_capability,
        "limit": launch.device.shared_memory,
        "dtypes": launch.dtypes,
        "descriptors": any("tensordesc" in compiled_in for compiled_in in launch.key),
        "options": {k: str(v) for k, v in launch.options.items()},
        "given": [name for name, given in zip(names, launch.arguments, strict=False) if given is not None],
        "tensor_core": None,
    }
    try:
        with sass.ptxas_log() as log:
            compiled = launch.compile()
        ptx = compiled.asm["ptx"]
        registers, stack = sass.resources(compiled)
        read = sass.read_sass(compiled) if "mma" in ptx or stack else None
        warnings = sass.serialisation_warnings(compiled, log.getvalue()) if "wgmma" in ptx else ()
    except Exception as error:
        return row | {"error": _innermost(error)}
    row |= {"registers": registers, "stack": stack, "shared_memory": compiled.metadata.shared, "warnings": warnings}
    row["metadata"] = _metadata(compiled)
    if read is not None:
        row |= {
            "tensor_core": read.tensor_core,
            "spills": read.spills,
            "instructions": dict(read.instructions),
            "loops": [_describe_loop(loop) for loop in read.loops],
        }
    return row


def _metadata(compiled: CompiledKernel) -> dict:
    """As Triton writes it beside the machine code."""
    (path,) = (path for name, path in compiled.metadata_group.items() if name.endswith(".json"))
    return json.loads(Path(path).read_text())


def _innermost(error: BaseException) -> str:
    """Triton wraps what went wrong once for each call that it was in."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"[-1000:]


def _describe_loop(loop: Loop) -> dict:
    return {
        "length": loop.length,
        "instructions": dict(loop.instructions),
        "register_operands": loop.register_operands,
        "waits": loop.waits,
        "copies": loop.copies,
        "copies_ahead": loop.copies_ahead,
    }


def rows(architecture: str, kind: str, *, every: bool, share: str, folder: Path) -> list[dict]:
    name = f"{architecture}-{kind}-{share.replace('/', 'of')}{'-every' if every else ''}"
    selections = Selections(folder)
    if (kept := selections.get(name)) is not None:
        return kept
    chosen = (every_one if every else of_each_configuration)(architecture, kind)
    number, of = map(int, share.split("/"))
    cache, found = Rows(folder), []
    for compilation in chosen[number::of]:
        row = cache.get(compilation.launch)
        if row is None:
            row = describe(compilation.launch)
            if "error" not in row:
                cache.put(compilation.launch, row)
        found.append(row | {"devices": compilation.devices, "limit": compilation.limit} | _launched(compilation, row))
    if not any("error" in row for row in found):
        selections.put(name, found)
    return found


def _launched(compilation: Compilation, row: dict) -> dict:
    """How many launches went to the stub driver, and what it refused."""
    on = the_stub()
    if on is None or "error" in row:
        return {"launched": 0, "refused": []}
    problems = refused(compilation.alike, compilation.launch, row["metadata"], on)
    return {"launched": len(compilation.alike), "refused": problems}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("architecture")
    parser.add_argument("kind")
    parser.add_argument("--every", action="store_true")
    parser.add_argument("--share", default="0/1")
    parser.add_argument("--cache", type=Path, default=FOLDER)
    given = parser.parse_args()
    for row in rows(given.architecture, given.kind, every=given.every, share=given.share, folder=given.cache):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
