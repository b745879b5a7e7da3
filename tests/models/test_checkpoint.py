"""A checkpoint is the old or the new one, never half of either, and a broken one is told as such."""

from __future__ import annotations

import os

import pytest
import torch

from models import checkpoint
from models.checkpoint import CheckpointError


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "folder" / "checkpoint.pt"
    checkpoint.save(path, {"step": 1, "weights": torch.arange(1000.0)})
    return path


def test_what_was_saved_is_loaded(path):
    state = checkpoint.load(path)
    assert state["step"] == 1
    assert torch.equal(state["weights"], torch.arange(1000.0))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def failing_replace(source, target):
    raise OSError("disk full")


def failing_save(state, file):
    file.write(b"half")
    raise OSError("disk full")


@pytest.mark.parametrize(
    ("where", "name", "failure"), [(os, "replace", failing_replace), (torch, "save", failing_save)]
)
def test_failed_write_leaves_the_old_one(path, monkeypatch, where, name, failure):
    with monkeypatch.context() as patched:
        patched.setattr(where, name, failure)
        with pytest.raises(OSError, match="disk full"):
            checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path)["step"] == 1
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [flipped, lambda c: c[: len(c) // 2], lambda c: b"", lambda c: b"PK" + c[:50]])
def test_corrupt_file_is_refused_by_name(path, damage):
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: the checkpoint is corrupt"):
        checkpoint.load(path)


@pytest.mark.parametrize("foreign", [{"model": {}}, [1, 2], torch.zeros(3)])
def test_foreign_file_is_refused(path, foreign):
    torch.save(foreign, path)
    with pytest.raises(CheckpointError, match="not a"):
        checkpoint.load(path)


def test_code_in_a_file_is_not_run(path, capsys):
    class Evil:
        def __reduce__(self):
            return print, ("gotcha",)

    torch.save(Evil(), path)
    with pytest.raises(CheckpointError):
        checkpoint.load(path)
    assert "gotcha" not in capsys.readouterr().out


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="nothing to resume"):
        checkpoint.load(tmp_path / "none.pt")
