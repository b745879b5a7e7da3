"""Launches on Triton's own driver, with a ``libcuda`` behind it that refuses what the real one would.

Kernels compiled for one launch of a configuration stand for all launches of it: what a driver looks at (grid, block,
shared memory, tensor maps) comes from the launch itself, and from the metadata that Triton keeps beside machine code.
"""

from __future__ import annotations

import functools
import json
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

from triton.compiler import CompiledKernel

from bench.lease import stub
from gpukern.runtime.compile_only import Launch
from tests.compile.cache import FOLDER

#: Bytes of a row of a box by the swizzle that Triton encodes: CUtensorMapSwizzle.
_SWIZZLED = {3: 128, 2: 64, 1: 32}
_LARGEST_SIDE = 256


@functools.cache
def the_stub() -> stub.Stub | None:
    """None without a C compiler or Python's headers, which Triton's launchers need too."""
    try:
        loaded = stub.Stub(stub.build(FOLDER / "stub"))
        with loaded.active():
            return loaded
    except (OSError, subprocess.SubprocessError):
        return None


def refused(launches: Iterable[Launch], compiled: Launch, metadata: dict[str, Any], on: stub.Stub) -> list[str]:
    """Why ``launches`` would not run, a line each reason; ``metadata`` is of ``compiled``, one that stands for them."""
    found: dict[str, None] = {}
    with on.active(compiled.device.compute_capability), tempfile.TemporaryDirectory() as scratch:
        for launch in launches:
            kernel = functools.partial(_kernel, _fitted(metadata, compiled, launch), Path(scratch))
            before = on.launches
            try:
                _run(launch, kernel)
                problem = "" if on.launches == before + 1 else f"no launch arrived, the grid is {launch.grid}"
            except Exception as error:
                problem = str(error).partition("\n")[0] or type(error).__name__
            if problem:
                found[f"driver: {problem}"] = None
    return list(found)


def _run(launch: Launch, kernel: Any) -> None:
    kernels, *_ = launch.function.device_caches[0]  # which makes the binder, and that sets what is replaced now
    kernels.clear()
    with mock.patch.object(launch.function, "compile", kernel):
        launch.function.run(*launch.arguments, grid=launch.grid, warmup=False, **launch.options)


def _kernel(metadata: dict[str, Any], folder: Path, source: Any, target: Any, options: Any) -> CompiledKernel:
    """As Triton reads one from its cache; of the machine code the stub reads nothing."""
    files = {"kernel.json": json.dumps(metadata), "kernel.cubin": ""}
    for name, text in files.items():
        (folder / name).write_text(text)
    return CompiledKernel(source, {name: folder / name for name in files}, "stub")


def _fitted(metadata: dict[str, Any], compiled: Launch, launch: Launch) -> dict[str, Any]:
    """``metadata`` with the boxes of ``launch``: steps along the sum and the shape of a tile may differ."""
    had, wanted = _descriptors(compiled), _descriptors(launch)
    if had == wanted or not metadata.get("tensordesc_meta"):
        return metadata
    known = dict(zip(had, metadata["tensordesc_meta"], strict=True))
    usual = next(iter(known.values()))
    return metadata | {"tensordesc_meta": [_map(known.get(name, usual), box) for name, box in wanted.items()]}


def _map(like: dict[str, Any], box: tuple[int, ...]) -> dict[str, Any]:
    """Triton's rule: the widest swizzle that a row of the box fills, and no side beyond what an instruction copies."""
    row = box[-1] * like["elem_size"]
    swizzle = next((number for number, width in _SWIZZLED.items() if row >= width), 0)
    widest = _SWIZZLED.get(swizzle, row) // like["elem_size"]
    sides = [min(side, _LARGEST_SIDE) for side in box[:-1]] + [min(box[-1], widest)]
    return like | {"swizzle": swizzle, "block_size": sides}


def _descriptors(launch: Launch) -> dict[str, tuple[int, ...]]:
    names = launch.function.arg_names
    given = zip(names, launch.arguments, strict=False)
    return {name: tuple(each.block_shape) for name, each in given if hasattr(each, "block_shape")}
