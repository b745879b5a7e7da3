"""A file is the old or the new one at every moment, and nothing else is left in its folder."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading

import pytest

from gpukern.runtime.files import replacing, write_bytes, write_text


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.pt2"
    path.write_text("old")
    return path


def files_of(path):
    return sorted(file.name for file in path.parent.iterdir())


def test_write_replaces_the_contents(path):
    write_text(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    write_bytes(str(path), b"\x00\r\n")
    assert path.read_bytes() == b"\x00\r\n" and files_of(path) == ["model.pt2"]


@pytest.mark.parametrize("problem", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_interrupted_writing_leaves_the_old_file_and_no_draft(path, problem):
    with pytest.raises(problem), replacing(path) as draft:
        assert draft.parent == path.parent and draft.suffix == ".pt2"
        draft.write_text("half")
        raise problem
    assert path.read_text() == "old" and files_of(path) == ["model.pt2"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_step_leaves_the_old_file_and_no_draft(path, monkeypatch, step):
    def fails(*arguments):
        raise OSError("no space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space"):
        patched.setattr(os, step, fails)
        write_text(path, "new")
    assert path.read_text() == "old" and files_of(path) == ["model.pt2"]


def test_text_that_cannot_be_encoded_leaves_the_old_file(path):
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "old" and files_of(path) == ["model.pt2"]


def test_the_draft_is_on_the_disk_before_it_gets_the_name(path, monkeypatch):
    steps, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (steps.append(path.read_text()), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (steps.append("replace"), replace(*names)))
    write_text(path, "new")
    assert steps == ["old", "replace"]


def test_a_writer_that_removes_the_draft_is_an_error(path):
    with pytest.raises(FileNotFoundError), replacing(path) as draft:
        draft.unlink()
    assert path.read_text() == "old"


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "nowhere" / "a.json", "{}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_mode_is_that_of_any_new_file(tmp_path, umask):
    # In a process of its own: the umask is the process's.
    program = f"import os; os.umask({umask}); from gpukern.runtime.files import write_text; write_text('a', '')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


def test_threads_that_write_one_file_at_once_never_mix(path):
    texts = [letter * 100_000 for letter in "abcd"]
    seen = []

    def write(text):
        for _ in range(10):
            write_text(path, text)
            seen.append(path.read_text())

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 40 and set(seen) <= set(texts) and files_of(path) == ["model.pt2"]


def test_a_folder_that_is_not_there_is_an_error_about_the_file(path):
    missing = path.parent / "folder" / "model.pt2"
    with pytest.raises(FileNotFoundError) as raised:
        write_text(missing, "new")
    assert raised.value.filename == str(missing)
