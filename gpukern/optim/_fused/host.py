"""The kernels compiled for the host, to run them without a GPU, with ``GPUKERN_EMULATE=1``."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np

from gpukern.optim._fused.codegen import Variant, source
from gpukern.runtime.cache import cache_folder
from gpukern.runtime.files import replacing

#: No contraction: the source specifies where a product and a sum are rounded once, here as on the device.
_FLAGS = ("-std=c++20", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", "-Wno-unknown-pragmas")
#: The environment variable with more flags: sanitizers, for instance.
_MORE_FLAGS = "GPUKERN_HOST_CXXFLAGS"


class HostProgram:
    """Kernels on the host. A block has one thread unless ``threads`` is set: the interesting part of more is how they
    work together, which is slow here."""

    def __init__(self, variant: Variant, threads: int = 1) -> None:
        self._library = ctypes.CDLL(str(_library(variant)))
        self._threads = threads

    def launch(self, kernel: str, blocks: int, arguments: np.ndarray) -> None:
        entry = getattr(self._library, f"{kernel}_on_host")
        entry(ctypes.c_uint(blocks), ctypes.c_uint(self._threads), arguments.ctypes.data_as(ctypes.c_void_p))


@functools.cache
def _library(variant: Variant) -> Path:
    """Return the library, compiled once for each text, compiler and flags, and kept in the user's cache."""
    program = compiler()
    flags = (*_FLAGS, *os.environ.get(_MORE_FLAGS, "").split())
    text = source(variant, "host.h")
    name = hashlib.sha256("\0".join((version(program), *flags, text)).encode()).hexdigest()[:32]
    folder = cache_folder() / "host"
    path = folder / f"{name}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _compile(program, flags, text, path)
    return path


def _compile(program: str, flags: tuple[str, ...], text: str, path: Path) -> None:
    with replacing(path) as draft:  # another process may be first: it makes the same
        command = [program, *flags, "-x", "c++", "-", "-o", str(draft)]
        done = subprocess.run(command, input=text, capture_output=True, encoding="utf-8")
        if done.returncode:
            raise RuntimeError(f"{program} does not compile the optimizer's kernels:\n{done.stderr}")


@functools.cache
def compiler() -> str:
    """The path of a C++ compiler: that of ``CXX``, g++ or clang++. RuntimeError if there is none."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise RuntimeError(
        "GPUKERN_EMULATE=1 runs the optimizers' kernels compiled for the host, and there is no C++ compiler: "
        "install g++ or name one in CXX. Without GPUKERN_EMULATE they run in reference mode."
    )


@functools.cache
def version(path: str) -> str:
    """Return the version that the compiler at ``path`` reports."""
    return subprocess.run([path, "--version"], capture_output=True, text=True).stdout
