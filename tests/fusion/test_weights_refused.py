"""What is said of files that hold no weights: the file, the option, and what is in the way, in words of ours."""

from __future__ import annotations

import argparse
import gzip
import json
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from gpukern.cli import app
from gpukern.fusion.errors import WeightsError
from gpukern.fusion.sources import load_model
from gpukern.fusion.weights.load import load_weights

TINY = "tests.fusion.made_up:tiny"
STATE = {"0.weight": torch.zeros(2, 3)}


class Settings:
    """Of the user's own."""


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def written(path, held) -> None:
    if isinstance(held, bytes):
        path.write_bytes(held)
    else:
        torch.save(held, path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 99\n"
PARTS = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
FILES = [
    ("namespace.pth", {"model": STATE, "args": argparse.Namespace(lr=0.1)}, "settings of the training program (arg"),
    ("number.pth", {"state_dict": STATE, "best": np.float64(0.7)}, "NumPy numbers or arrays ("),
    ("array.pth", {"state_dict": STATE, "curve": np.zeros(3)}, "NumPy numbers or arrays ("),
    ("whole.pth", nn.Sequential(nn.Conv2d(3, 4, 3)), "a whole pickled model (torch.nn.modules.container.Sequential"),
    ("both.ckpt", {"model": nn.Linear(1, 1), "ema": None}, "a whole pickled model (torch.nn.modules.linear.Linear)"),
    ("own.pth", {"model": STATE, "cfg": Settings()}, "Python objects besides weights (tests."),
    ("bomb.pth", {"0.weight": Bomb()}, "a call that no weights need (builtins.exec)"),
    ("pointer.pth", POINTER, "a Git LFS pointer, not the file itself: git lfs pull"),
    ("pointer.safetensors", POINTER, "a Git LFS pointer, not the file itself"),
    ("page.pth", b"<!DOCTYPE html><html><body>404</body></html>", "a page of HTML"),
    ("page.bin", b"\xef\xbb\xbf\n <html>", "a page of HTML"),
    ("denied.pt", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a page of HTML or XML"),
    ("page.safetensors", b"<html>404 not found</html>", "a page of HTML"),
    ("error.pth", b'{"error": "gated repository"}', "a JSON file, without weights"),
    ("denied.ckpt", b"Access to this file is restricted.\n", "a text file that begins with 'Access to this file"),
    ("pytorch_model.bin.index.json", PARTS.encode(), "the index of weights in 2 files (model-00001-"),
    ("empty.pth", b"", "empty"),
    ("empty.safetensors", b"", "empty"),
    ("packed.pth", gzip.compress(b"weights"), "compressed by gzip: unpack it first"),
    ("keras.bin", b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
    ("keras.h5", b"\x89HDF\r\n\x1a\n" + bytes(99), "weights come from .safetensors"),
    ("llama.bin", b"GGUF" + bytes(99), "a GGUF file"),
    ("noise.pth", bytes(range(200, 256)), "no file of torch.save"),
    ("pickled.pkl", pickle.dumps({"0.weight": [1.0]}), "it was written by pickle, and not by torch.save"),
    ("optimizer.pth", OPTIMIZER, "the state of an optimizer, and none of a model"),
    ("trainer.pth", {"optimizer": OPTIMIZER}, "the state of an optimizer, and none of a model"),
    ("log.pth", {"epoch": 3, "loss": 0.5}, "there is only epoch, loss"),
]  # fmt: skip


@pytest.fixture(params=FILES, ids=[name for name, *_ in FILES])
def refused(request, tmp_path):
    name, held, words = request.param
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors")
    written(tmp_path / name, held)
    return tmp_path / name, words


def test_a_refusal_says_what_the_file_is(refused):
    path, words = refused
    with pytest.raises(WeightsError) as told:
        load_weights(path)
    told = str(told.value)
    assert told.startswith(str(path)) and words in told
    assert all(foreign not in told for foreign in ("weights_only", "can still be loaded", "\x1b", "\n"))


def test_what_was_saved_before_the_zip_format(tmp_path):
    torch.save({"args": argparse.Namespace()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match=r"settings of the training program \(argparse\.Namespace\)") as told:
        load_weights(tmp_path / "old.pth")
    assert "weights_only" not in str(told.value)


def test_archives_of_other_programs(tmp_path):
    torch.jit.script(nn.Linear(1, 1)).save(tmp_path / "script.pt")
    np.savez(tmp_path / "arrays.npz", a=np.zeros(2))
    (tmp_path / "arrays.npz").rename(tmp_path / "arrays.pth")
    torch.export.save(torch.export.export(nn.Linear(1, 1), (torch.zeros(1, 1),)), tmp_path / "exported.pt2")
    (tmp_path / "exported.pt2").rename(tmp_path / "exported.pt")
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("inner.pth", b"weights")
    with tarfile.open(tmp_path / "other.tar", "w") as archive:
        archive.add(tmp_path / "other.pth", "other.pth")
    for file, words in {
        "script.pt": "a TorchScript program: torch.save",
        "arrays.pth": "an archive of NumPy arrays",
        "exported.pt": "an exported program, which holds its weights: name it as the model",
        "other.pth": "a zip archive that torch.save did not write; in it there is inner.pth",
        "other.tar": "a tar archive: unpack it first",
    }.items():
        with pytest.raises(WeightsError) as told:
            load_weights(tmp_path / file)
        assert f"{tmp_path / file} cannot be loaded as weights: it is {words}" in str(told.value)


def test_folders(tmp_path):
    with pytest.raises(WeightsError, match=r"is a folder, not a file$"):
        load_weights(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(WeightsError, match=r"is a folder, not a file; in it there is model\.safetensors"):
        load_weights(tmp_path)
    for name in (".metadata", "__0_0.distcp"):
        (tmp_path / name).touch()
    with pytest.raises(WeightsError, match=r"a folder of torch\.distributed\.checkpoint"):
        load_weights(tmp_path)


def test_nothing_is_downloaded():
    with pytest.raises(WeightsError, match="is an address, and nothing is downloaded: name a file"):
        load_weights("https://example.org/resnet50.pth")


def test_the_contents_count_and_not_the_ending(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    torch.save(STATE, tmp_path / "saved.safetensors")
    safetensors.save_file(STATE, tmp_path / "safe.bin")
    for file in ("saved.safetensors", "safe.bin"):
        assert load_weights(tmp_path / file).keys() == STATE.keys()


@pytest.mark.parametrize("file", ["namespace.pth", "page.pth", "nowhere.pth", "other.pth"])
def test_the_command_line_blames_the_weights(tmp_path, file):
    written(tmp_path / "namespace.pth", {"model": STATE, "args": argparse.Namespace(lr=0.1)})
    written(tmp_path / "page.pth", b"<html>")
    written(tmp_path / "other.pth", STATE)
    result = CliRunner().invoke(app, ["fuse", TINY, "--weights", str(tmp_path / file), "--input", "1,3,8,8"])
    assert result.exit_code == 2 and "Invalid value for --weights" in result.output
    assert file in "".join(result.output.replace("│", "").split())


def test_the_command_line_blames_the_model_where_that_is_a_file(tmp_path):
    written(tmp_path / "page.pth", b"<html>")
    result = CliRunner().invoke(app, ["fuse", str(tmp_path / "page.pth"), "--input", "1,3,8,8"])
    assert result.exit_code == 2 and "Invalid value for MODEL" in result.output


def test_the_command_line_tells_which_weights_were_taken(tmp_path):
    state = load_model(TINY).state_dict()
    torch.save(
        {"model": state, "model_ema": {f"module.{name}": held for name, held in state.items()}}, tmp_path / "w.pt"
    )
    result = CliRunner().invoke(app, ["fuse", TINY, "--weights", str(tmp_path / "w.pt"), "--input", "2,3,8,8"])
    assert result.exit_code == 0
    assert "'model_ema' (averaged weights) was taken, and not 'model'" in " ".join(result.output.split())
