"""The way from source to machine code: which options, what is kept on disk, and what is said of what fails."""

from __future__ import annotations

import pytest

from gpukern.optim._fused import codegen, rules
from gpukern.optim._fused.nvrtc import OPTIONS, machine_code
from gpukern.runtime import cache
from tests.optim.cupy_stub import Nvrtc

TEXT = "of a kernel"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of ``$GPUKERN_CUBINS``; not there yet. The user's cache is elsewhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("GPUKERN_CUBINS", str(tmp_path / "cubins"))
    return tmp_path / "cubins"


@pytest.mark.parametrize(
    ("architecture", "target", "made"),
    [(90, "sm_90", b"of"), (75, "sm_75", b"of"), (89, "compute_80", b"PTX of"), (121, "compute_100", b"PTX of")],
)
def test_for_which_gpu(folder, architecture, target, made):
    nvrtc = Nvrtc()
    assert machine_code(nvrtc, TEXT, architecture) == made + b" number 1"
    assert nvrtc.sources == [(TEXT, (f"-arch={target}", *OPTIONS))] and not nvrtc.alive


def test_a_gpu_that_nvrtc_left_behind(folder):
    with pytest.raises(RuntimeError, match=r"NVRTC 13\.0 compiles for no GPU as old as sm_70"):
        machine_code(Nvrtc(), TEXT, 70)


def test_what_does_not_compile_says_why(folder):
    nvrtc = Nvrtc(refuses='kernels.cu(1): error: identifier "y" is undefined')
    with pytest.raises(
        RuntimeError, match=r"-arch=sm_90 --std=c\+\+17: NVRTC_ERROR_COMPILATION \(6\)\nkernels.*undefined$"
    ):
        machine_code(nvrtc, TEXT, 90)
    assert not nvrtc.alive and not folder.exists()


def test_it_is_compiled_once_for_all_that_it_depends_on(folder):
    first = Nvrtc()
    found = machine_code(first, TEXT, 90)
    assert machine_code(Nvrtc(), TEXT, 90) == found and len(list(folder.iterdir())) == 1
    for other, text, architecture in (
        (Nvrtc(), "of another", 90),
        (Nvrtc(), TEXT, 80),
        (Nvrtc(version=(13, 1)), TEXT, 90),
    ):
        machine_code(other, text, architecture)
        assert len(other.sources) == 1
    assert machine_code(again := Nvrtc(), TEXT, 90) == found and not again.sources
    assert len(list(folder.iterdir())) == 4, "and no drafts"


def test_a_folder_is_found_wherever_it_is_moved(folder, tmp_path, monkeypatch):
    machine_code(Nvrtc(), TEXT, 90)
    folder.rename(tmp_path / "elsewhere")
    monkeypatch.setenv("GPUKERN_CUBINS", str(tmp_path / "elsewhere"))
    machine_code(moved := Nvrtc(), TEXT, 90)
    assert not moved.sources


def test_where_nobody_names_a_folder_it_is_the_users(folder, monkeypatch):
    monkeypatch.delenv("GPUKERN_CUBINS")
    machine_code(Nvrtc(), TEXT, 90)
    assert list((cache.cache_folder() / "cubins").iterdir()) and not folder.exists()
    monkeypatch.setenv("GPUKERN_CUBINS", "")
    machine_code(again := Nvrtc(), TEXT, 90)
    assert again.sources and not folder.exists(), "switched off"


@pytest.mark.parametrize("damage", [b"", b"short", b"x" * 100])
def test_what_is_damaged_is_made_anew(folder, damage):
    found = machine_code(Nvrtc(), TEXT, 90)
    (path,) = folder.iterdir()
    path.write_bytes(damage)
    assert machine_code(Nvrtc(), TEXT, 90) == found
    machine_code(again := Nvrtc(), TEXT, 90)
    assert not again.sources


def test_a_folder_that_cannot_be_written_keeps_nothing(folder):
    folder.write_text("a file")
    assert machine_code(Nvrtc(), TEXT, 90) == b"of number 1"
    assert folder.read_text() == "a file"


def test_cupys_nvrtc_does_it(folder):
    """Without a GPU: so a machine with one can be given what it would compile."""
    nvrtc = pytest.importorskip("cupy").cuda.nvrtc
    try:
        nvrtc.getVersion()
    except Exception as missing:
        pytest.skip(f"CuPy finds no NVRTC: {missing}")
    given = codegen.Variant(rules.SGD, *["float32"] * 3, (), 128)
    assert machine_code(nvrtc, codegen.source(given), 90).startswith(b"\x7fELF")
    assert b".target sm_" in machine_code(nvrtc, codegen.source(given), max(nvrtc.getSupportedArchs()) + 1)
    with pytest.raises(RuntimeError, match='identifier "unknown" is undefined'):
        machine_code(nvrtc, 'extern "C" __global__ void kernel() { unknown(); }', 90)
