"""What is prepared for a rented GPU: kernels in an archive, a GPU that is pretended, what ``make lease`` objects to."""

from __future__ import annotations

import collections
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton.backends.nvidia.driver")

from bench import run as run_module
from bench.environment import source_hash
from bench.lease import __main__ as lease
from bench.lease import calls, carried, stub
from bench.lease.carried import Carried
from tests.bench import made_up
from tests.bench.test_run import chosen
from tests.bench.tiny import QUICK, Products

HERE = Carried(source_hash(), carried.triton_key(), "9.0", 2, ["conv/forward/float16/channels_last/x"])


@pytest.fixture
def packed(tmp_path) -> Path:
    """An archive with two kernels."""
    made = tmp_path / "cache"
    for name in ("AB/one.cubin", "AB/one.json", "AB/one.source", "AB/one.llir", "CD/two.cubin"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(name)
    archive = tmp_path / "new" / "kernels.tar.xz"
    assert carried.pack(made, HERE, archive) == archive.stat().st_size
    return archive


def changed(archive: Path, **changes: object) -> Path:
    """The archive of another machine."""
    folder = archive.parent / "changed"
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    carried.pack(folder, Carried(**{**HERE.__dict__, **changes}), archive)
    return archive


def test_kernels_arrive_without_what_only_people_read(packed, tmp_path):
    there = tmp_path / "there"
    assert carried.unpack(packed, there) == "2 kernels brought along, for 1 rows"
    found = {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()}
    assert found == {"AB/one.cubin", "AB/one.json", "CD/two.cubin", "carried.json"}
    # What has been compiled since stays.
    (there / "AB" / "one.cubin").write_text("newer")
    carried.unpack(packed, there)
    assert (there / "AB" / "one.cubin").read_text() == "newer"


@pytest.mark.parametrize(
    "changes, said",
    [({"triton": "another"}, "KEY DIFFERS"), ({"source": "another"}, "CODE DIFFERS"), ({}, "2 kernels")],
)
def test_it_says_loudly_what_kernels_of_elsewhere_are_worth(changes, said, packed, tmp_path, monkeypatch):
    folder = tmp_path / "there"
    assert carried.unpack(changed(packed, **changes), folder).startswith(said)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    carried.rows.cache_clear()
    assert carried.rows() == (frozenset() if changes else frozenset(HERE.rows))
    carried.rows.cache_clear()


def test_without_an_archive(tmp_path):
    assert carried.unpack(tmp_path / "none.tar.xz", tmp_path / "there").startswith("no kernels were brought along")
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("brought, compiled", [([0, 1, 2], []), ([0, 2], [[1]]), ([], [[0, 1, 2]])])
def test_rows_whose_kernels_were_brought_along_are_not_compiled_once_more(brought, compiled, tmp_path, monkeypatch):
    suite = Products()
    tasks = chosen(suite)
    keys = [task.case.key for task in tasks]
    asked = []
    monkeypatch.setattr(run_module.carried, "rows", lambda: frozenset(keys[index] for index in brought))
    monkeypatch.setattr(run_module, "_worth_compiling_together", lambda suite, waiting, device: bool(waiting))
    monkeypatch.setattr(run_module, "device_spec", lambda device: None)
    monkeypatch.setattr(
        run_module, "precompile", lambda name, given, *_, **__: asked.append([keys.index(t.case.key) for t in given])
    )
    monkeypatch.setattr(run_module, "ceilings", lambda device: run_module.results.Ceilings(1e9, {"float32": 1e9}))
    run_module.run(suite, tasks, QUICK, torch.device("cpu"), tmp_path / "tiny.json")
    assert asked == compiled


# ---- a GPU that is pretended ---------------------------------------------------------------------------------------

PRETENDED = """
import torch
import gpukern.functional as F
from bench.timing import EagerStopwatch, GraphStopwatch

x, w = (torch.randn(size, device="cuda").half().to(memory_format=torch.channels_last)
        for size in ((8, 64, 14, 14), (64, 64, 3, 3)))
assert torch.cuda.is_available() and torch.cuda.get_device_name() == "NVIDIA H200" and x.device.type == "meta"
for watch in (GraphStopwatch, EagerStopwatch):
    stopwatch = watch([lambda: F.conv2d(x, w, padding=1)], 1e-3)
    stopwatch.start()
    assert stopwatch.stop() == 1e-3
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_pretended_gpu_launches_on_the_stub_and_tells_what_was_compiled(tmp_path, run_python):
    place = str(stub.build(tmp_path / "stub"))
    log, stub_log = tmp_path / "log", tmp_path / "stub.log"
    environment = {
        "LEASE_DRY": "1", "LEASE_LOG": str(log), "STUB_LOG": str(stub_log), "LD_LIBRARY_PATH": place,
        "TRITON_LIBCUDA_PATH": place, "TRITON_CACHE_DIR": str(tmp_path / "cache"),
    }  # fmt: skip
    code = "from bench.lease.pretend import pretend_gpu; pretend_gpu()\n"
    for expected in ("miss", "hit"):
        log.write_text("")
        ran = run_python(code + PRETENDED, **environment)
        assert ran.returncode == 0, ran.stderr
        kinds = [line.partition(" ")[0] for line in log.read_text().splitlines()]
        assert kinds.count(expected) == 1 and ("compiler" in kinds) == (expected == "miss")
    counts = stub_log.read_text().splitlines()
    assert len(counts) == 2 and all(line.endswith("refusals 0") and " maps 0" not in line for line in counts)


# ---- what make lease objects to ------------------------------------------------------------------------------------


def trial(
    hits: int = 9,
    compiled: tuple[str, ...] = (),
    refused: tuple[str, ...] = (),
    first: float | None = 20.0,
    ours: float | str = 3.0,
):
    counts = collections.Counter(hit=hits, miss=len(compiled))
    return SimpleNamespace(
        counts=lambda: counts,
        compiled=lambda: list(compiled),
        refusals=lambda: list(refused),
        rows=lambda: [made_up.row(ours)],
        first_result=first,
    )


def test_nothing_to_object_to():
    assert lease.faults(trial(), {"first": 0, "second": 0}, 10_000_000) == []


@pytest.mark.parametrize(
    "given, statuses, size, said",
    [
        (trial(compiled=("miss conv2d_gemm_kernel",)), {}, 0, "compiled in the second run: miss conv2d_gemm_kernel"),
        (trial(compiled=("compiler __triton_launcher",)), {}, 0, "compiled in the second run: compiler"),
        (trial(refused=("refused tensor map: rank 6",)), {}, 0, "refused tensor map: rank 6"),
        (trial(hits=0), {}, 0, "no kernel was launched"),
        (trial(ours="failed"), {}, 0, "a problem: gpukern"),
        (trial(first=61.0), {}, 0, "saved after 61.0 s, not within 60"),
        (trial(first=None), {}, 0, "saved after None s"),
        (trial(), {"first": 1}, 0, "first ended with exit status 1"),
        (trial(), {}, 21_000_000, "the archive has 21.0 MB, 20 are allowed"),
    ],
)
def test_what_must_be_mended_first(given, statuses, size, said):
    (found,) = lease.faults(given, statuses, size)
    assert said in found


def test_steps_that_cannot_be_tried_without_a_gpu_are_few(tmp_path):
    folder = tmp_path / "device" / "commit"
    left_out = [step.name for step in (*calls.first(folder), *calls.second(folder)) if not step.dry]
    assert left_out == ["smoke-optimizers", "optimizer-resnet50", "gpu-tests"]


def test_a_copy_has_what_git_tracks_and_nothing_that_it_ignores(tmp_path):
    lease._copy(tmp_path)
    assert (tmp_path / "bench" / "gpu.sh").exists() and (tmp_path / "bench" / "lease" / "stub.c").exists()
    assert not (tmp_path / ".cache").exists() and not (tmp_path / ".git").exists()


def test_versions_are_pinned_that_decide_about_kernels():
    lines = lease.REQUIREMENTS.read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lines if "==" in line}
    assert {"torch", "triton"} <= pinned


def test_a_trial_begins_without_the_rows_of_the_device(tmp_path):
    measured = list((lease.ROOT / "bench" / "results" / "nvidia-h200").glob("*/conv.json"))
    assert measured  # else this shows nothing
    trial = lease.Trial("python", tmp_path, None)
    assert list(trial.rows()) == []


def test_without_python_3_12_it_says_what_to_type(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("LEASE_PYTHON", raising=False)
    monkeypatch.setattr(lease, "VENV", tmp_path / "venv")
    for base in (str(tmp_path / "missing"), shutil.which("false")):
        monkeypatch.setenv("LEASE_BASE_PYTHON", base)
        with pytest.raises(SystemExit, match=r"LEASE_BASE_PYTHON=/path/to/python3\.12 make lease"):
            lease.python()
    # No half-made venv is taken for a whole one.
    assert not (tmp_path / "venv" / "installed.txt").exists()
