"""Compilation of a rule's kernels to a loadable binary by CuPy's NVRTC, with our own options.

CuPy's own modules are compiled with ``-ftz=true``: moments below 2⁻¹²⁶ would become zeros, which PyTorch keeps.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpukern.runtime.cache import cache_folder, kept

#: Options besides the architecture. Multiplications and additions are contracted, NVRTC's default.
OPTIONS = ("--std=c++17",)


def machine_code(nvrtc: Any, text: str, architecture: int) -> bytes:
    """Compile ``text`` for a GPU of ``architecture``, such as 90; ``nvrtc`` is ``cupy.cuda.nvrtc``; no GPU is needed.

    A cubin; PTX, which the driver compiles, for a GPU unknown to this NVRTC. Kept on disk by all that it depends
    on: in ``$GPUKERN_CUBINS``, else in the user's cache; an empty ``GPUKERN_CUBINS`` keeps nothing. RuntimeError with
    NVRTC's own words for what it does not compile.
    """
    version = ".".join(map(str, nvrtc.getVersion()))
    target = _target(architecture, nvrtc.getSupportedArchs(), version)
    options = (f"-arch={target}", *OPTIONS)
    return kept(_folder(), (text, *options, version), lambda: _compile(nvrtc, text, options, version))


def _target(architecture: int, known: Iterable[int], version: str) -> str:
    if architecture in known:
        return f"sm_{architecture}"
    older = [each for each in known if each < architecture]
    if not older:
        raise RuntimeError(f"NVRTC {version} compiles for no GPU as old as sm_{architecture}")
    return f"compute_{max(older)}"


def _folder() -> Path | None:
    chosen = os.environ.get("GPUKERN_CUBINS")
    if chosen == "":
        return None
    return Path(chosen) if chosen else cache_folder() / "cubins"


def _compile(nvrtc: Any, text: str, options: tuple[str, ...], version: str) -> bytes:
    program = nvrtc.createProgram(text, "gpukern_optim.cu", (), ())
    try:
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as problem:
            said = nvrtc.getProgramLog(program).strip("\0\n")
            words = f"NVRTC {version} does not compile the optimizers' kernels with {' '.join(options)}: {problem}"
            raise RuntimeError(f"{words}\n{said}") from None
        return nvrtc.getCUBIN(program) if options[0].startswith("-arch=sm_") else nvrtc.getPTX(program)
    finally:
        nvrtc.destroyProgram(program)
