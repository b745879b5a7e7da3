"""Rows are read off compiled kernels once, and again when anything that they depend on has changed."""

from __future__ import annotations

import json
import os
import time
from types import SimpleNamespace

import pytest

from tests.compile.cache import Rows, Selections, digest

KERNELS = """
import triton, triton.language as tl

@triton.jit
def part(x):
    return x + 1

@triton.jit
def kernel(x_ptr):
    tl.store(x_ptr, part(tl.load(x_ptr)))
"""

RUN = """
import functools, json, sys
from pathlib import Path
folder = Path(sys.argv[1])
sys.path.insert(0, sys.argv[1])
import torch
import kernels
from gpukern.runtime.compile_only import record_launches
from gpukern.runtime.device import H100
from tests.compile import worker
from tests.compile.cache import Selections
from tests.compile.configurations import Compilation

recorded, described, describe = [], [], worker.describe

def record(architecture, kind):
    recorded.append(kind)
    with record_launches(H100) as launches:
        kernels.kernel[(1,)](torch.empty(1, device="meta"), num_warps=int(sys.argv[2]))
    return [Compilation(launches[0], ("H100",), 1000)]

def count(launch):
    described.append(launch.kernel)
    return describe(launch)

worker.of_each_configuration, worker.describe = record, count
worker.Selections = functools.partial(Selections, sources=("kernels.py", "other.py"), root=folder)
rows = worker.rows("sm_90", "float16", every=False, share="0/1", folder=folder / "cache")
print(json.dumps([len(recorded), len(described), rows]))
"""


@pytest.fixture
def run(run_python, tmp_path):
    def run(kernels: str = KERNELS, other: str = "", warps: int = 4) -> tuple[int, int, list[dict]]:
        """(selections recorded, kernels read, rows)."""
        (tmp_path / "kernels.py").write_text(kernels)
        (tmp_path / "other.py").write_text(other)
        result = run_python(RUN, str(tmp_path), str(warps), PYTHONDONTWRITEBYTECODE="1")
        assert result.returncode == 0, result.stderr
        return tuple(json.loads(result.stdout))

    return run


def test_unchanged_kernels_are_not_compiled_again(run):
    recorded, described, rows = run()
    assert (recorded, described) == (1, 1) and rows[0]["kernel"] == "kernel" and rows[0]["limit"] == 1000
    assert run() == (0, 0, rows)
    assert run(other="x = 1") == (1, 0, rows)  # other launches may be recorded now
    assert run(other="x = 2", warps=8)[:2] == (1, 1)


def test_a_changed_kernel_is_compiled_again(run):
    run()
    assert run(KERNELS.replace("x + 1", "x + 2"))[:2] == (1, 1)  # in the function that it calls
    assert run()[:2] == (1, 0)


def test_what_does_not_compile_is_tried_again(run):
    broken = KERNELS.replace("x + 1", "x + unknown")
    for _ in range(2):
        recorded, described, rows = run(broken)
        assert (recorded, described) == (1, 1) and "unknown" in rows[0]["error"]


def test_rows_are_kept_by_fingerprint(tmp_path):
    rows, one, other = Rows(tmp_path), SimpleNamespace(fingerprint="1"), SimpleNamespace(fingerprint="2")
    rows.put(one, {"spills": 3})
    assert Rows(tmp_path).get(one) == {"spills": 3} and rows.get(other) is None


def test_selections_are_kept_until_a_source_changes(tmp_path):
    def selections() -> Selections:
        return Selections(tmp_path / "cache", sources=("a.py",), root=tmp_path)

    (tmp_path / "a.py").write_text("1")
    selections().put("sm_90", [{"spills": 3}])
    assert selections().get("sm_90") == [{"spills": 3}] and selections().get("sm_80") is None
    (tmp_path / "a.py").write_text("2")
    assert selections().get("sm_90") is None


def test_damaged_files_are_read_as_missing(tmp_path):
    launch = SimpleNamespace(fingerprint="1")
    Rows(tmp_path).put(launch, {"spills": 3})
    Selections(tmp_path).put("sm_90", [])
    for path in tmp_path.rglob("*.json"):
        path.write_text(path.read_text()[:-3])
    assert Rows(tmp_path).get(launch) is None and Selections(tmp_path).get("sm_90") is None


def test_rows_of_no_use_for_a_month_are_forgotten(tmp_path):
    rows, old, used = Rows(tmp_path), SimpleNamespace(fingerprint="1"), SimpleNamespace(fingerprint="2")
    for launch in (old, used):
        rows.put(launch, {})
    for path in tmp_path.rglob("*.json"):
        os.utime(path, (time.time() - 31 * 24 * 3600,) * 2)
    rows.get(used)
    rows.forget_old()
    assert rows.get(old) is None and rows.get(used) == {}


def test_digest_knows_contents_and_names(tmp_path):
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "a.py").write_text("1")
    first = digest("package", root=tmp_path)
    (folder / "b.txt").write_text("no source")
    assert digest("package", root=tmp_path) == first
    (folder / "a.py").write_text("2")
    assert digest("package", root=tmp_path) != first
    (folder / "a.py").write_text("1")
    assert digest("package", root=tmp_path) == first
    (folder / "a.py").rename(folder / "c.py")
    assert digest("package", root=tmp_path) != first
