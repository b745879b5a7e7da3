"""Triton's own driver on a ``libcuda`` that is not there (``stub.c``): real launchers, real descriptors, no GPU.

What the stub refuses raises in Triton as on a GPU, with the reason in the message.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

SOURCE = Path(__file__).with_name("stub.c")
_NAME = "libcuda.so.1"


def build(folder: Path) -> Path:
    """Compile the stub, unless ``folder`` has it already; the folder that it is in, for LD_LIBRARY_PATH."""
    include = Path(nvidia.__file__).with_name("include")
    made = folder / hashlib.sha256(SOURCE.read_bytes() + triton.__version__.encode()).hexdigest()[:16]
    if not (made / _NAME).exists():
        made.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            library = Path(scratch) / _NAME
            compiler = os.environ.get("CC", "cc")
            options = "-shared", "-fPIC", "-O1", f"-Wl,-soname,{_NAME}", f"-I{include}"
            subprocess.run([compiler, *options, str(SOURCE), "-o", str(library)], check=True)
            library.replace(made / _NAME)
    return made


class Stub:
    """The library, loaded into this process, and what it counted."""

    def __init__(self, folder: Path) -> None:
        ctypes.CDLL(str(folder / _NAME), mode=ctypes.RTLD_GLOBAL)
        # By its name, as Triton finds it: a real driver that was there first would get our launches.
        self._library = ctypes.CDLL(_NAME)
        if not hasattr(self._library, "stub_launches"):
            raise RuntimeError(f"the real {_NAME} is loaded already: LD_LIBRARY_PATH={folder}")
        for name in ("stub_launches", "stub_maps", "stub_refusals"):
            getattr(self._library, name).restype = ctypes.c_long
        # Where Triton's own C code finds it when it is linked.
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)

    @property
    def launches(self) -> int:
        return self._library.stub_launches()

    @property
    def maps(self) -> int:
        return self._library.stub_maps()

    @property
    def refusals(self) -> int:
        return self._library.stub_refusals()

    def driver(self, capability: tuple[int, int] = (9, 0)) -> nvidia.CudaDriver:
        """Triton's driver for a device of this compute capability, which PyTorch has none of."""
        made = nvidia.CudaDriver()
        made.get_device_capability = lambda device=None: capability
        made.get_current_device = lambda: 0
        made.set_current_device = lambda device: None
        made.get_current_stream = lambda device: 0
        return made

    @contextlib.contextmanager
    def active(self, capability: tuple[int, int] = (9, 0)) -> Iterator[nvidia.CudaDriver]:
        """Inside, Triton launches on the stub."""
        before, made = driver._active, self.driver(capability)
        driver.set_active(made)
        try:
            yield made
        finally:
            driver._active = before
