"""Fused models as files: the round trip, also into a fresh process, and what is refused."""

from __future__ import annotations

import enum
import os
import stat
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import gpukern
from gpukern.fusion import FusionError, artifact
from tests.conftest import ROOT
from tests.fusion.networks import conv, net, norm, one

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("reference_mode"),
]


def network():
    """Returns a dict of tuples, and reshapes what lies channels_last."""
    return net(
        lambda m, x: {"images": (y := m.b(m.a(x)).relu(), None, 3), "logits": m.c(y.flatten(1))},
        a=conv(),
        b=norm(),
        c=torch.nn.Linear(196, 3),
    )


LOAD = """
import sys, torch, gpukern
fused = gpukern.load(sys.argv[1])
x, expected = torch.load(sys.argv[2])
y = fused(x)
assert torch.equal(y["logits"], expected["logits"]) and torch.equal(y["images"][0], expected["images"][0])
assert y["images"][1:] == (None, 3)
print(fused.report.fused[0].pattern, tuple(fused(x[:1])["logits"].shape))
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_fresh_process_loads_what_was_saved(tmp_path, run_python, dtype):
    model, (x,) = network()
    fused = gpukern.fuse(model, x, dtype=dtype)
    path, tensors = tmp_path / "fused.pt2", tmp_path / "tensors.pt"
    fused.save(path)
    x = torch.randn(5, *x.shape[1:])
    torch.save((x, fused(x)), tensors)
    run = run_python(LOAD, str(path), str(tensors))
    assert run.stdout == "conv2d + batch_norm + relu (1, 3)\n", run.stderr


def test_the_interface_of_an_earlier_version_is_read_and_written_with_what_came_since():
    text = Path(__file__).with_name("written").joinpath("interface.json").read_text()
    interface = artifact._interface_of(text)
    first, second = interface.inputs
    assert (first.sizes, first.dtype, second) == ((None, 3, 8, 8), torch.float32, None)
    assert interface.constants == (None, 3.0) and interface.signature.by_name_only == ("flip",)
    assert artifact._interface_as_text(interface) == text.replace('"more": false', '"more": false, "by_name": []')


def test_the_report_is_kept_and_can_be_saved_again(tmp_path):
    model, (x,) = network()
    fused = gpukern.fuse(model, x)
    fused.save(tmp_path / "a.pt2")
    loaded = gpukern.load(tmp_path / "a.pt2")
    assert loaded.report == fused.report
    loaded.save(tmp_path / "b.pt2")
    again = gpukern.load(str(tmp_path / "b.pt2"))
    x = torch.randn(3, *x.shape[1:])
    assert torch.equal(again(x)["logits"], fused(x)["logits"])
    # In any dtype and layout, as the module that was saved.
    given = x.half().contiguous(memory_format=torch.channels_last)
    assert torch.equal(again(given)["logits"], fused(given)["logits"])
    # As any new file, not as mkstemp's.
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(os.stat(tmp_path / "a.pt2").st_mode) == stat.S_IMODE(os.stat(tmp_path / "plain").st_mode)


def test_a_fixed_batch_is_kept(tmp_path):
    model, (x,) = one()
    fused = gpukern.fuse(model, x, dynamic_batch=False)
    fused.save(tmp_path / "a.pt2")
    loaded = gpukern.load(tmp_path / "a.pt2")
    assert torch.equal(loaded(x), fused(x))
    with pytest.raises(ValueError, match=r"of shape \[2, 4, 7, 7\], got \[4, 4, 7, 7\]"):
        loaded(torch.cat([x, x]))


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.pt2"):
        gpukern.load(tmp_path / "nothing.pt2")
    with pytest.raises(FusionError, match="no file"):
        gpukern.load(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_files(tmp_path, share):
    path = tmp_path / "a.pt2"
    gpukern.fuse(*one()).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(FusionError, match=r"a.pt2 cannot be read"):
        gpukern.load(path)


def test_changed_bytes_are_an_error_and_no_other_numbers(tmp_path):
    model, (x,) = one()
    path = tmp_path / "a.pt2"
    gpukern.fuse(model, x).save(path)
    with zipfile.ZipFile(path) as archive:
        weights = [each for each in archive.infolist() if "/data/weights/" in each.filename and each.file_size > 64]
    written = path.read_bytes()
    for entry in weights:
        name, extra = (int.from_bytes(written[entry.header_offset + at :][:2], "little") for at in (26, 28))
        changed = bytearray(written)
        changed[entry.header_offset + 30 + name + extra + entry.file_size // 2] ^= 0xFF
        path.write_bytes(changed)
        with pytest.raises(FusionError, match=r"damaged: wrong checksum of .*weights"):
            gpukern.load(path)
    assert weights


def test_files_of_another_kind(tmp_path):
    text, other, tensors = tmp_path / "a.pt2", tmp_path / "b.pt2", tmp_path / "c.pt2"
    text.write_text("not an archive")
    with pytest.raises(FusionError, match=r"a.pt2 cannot be read as a fused model: it is no .pt2 file"):
        gpukern.load(text)
    torch.save({"x": torch.ones(3)}, tensors)
    with pytest.raises(FusionError, match="cannot be read"):
        gpukern.load(tensors)
    model, x = one()
    torch.export.save(torch.export.export(model, x), other)
    with pytest.raises(FusionError, match="but no fused model"):
        gpukern.load(other)


def test_a_report_that_cannot_be_read(tmp_path):
    model, x = one()
    path = tmp_path / "a.pt2"
    torch.export.save(
        torch.export.export(model, x), path, extra_files={"gpukern_report.json": "{}", "gpukern_interface.json": "{}"}
    )
    with pytest.raises(FusionError, match=r"report in .* cannot be read"):
        gpukern.load(path)


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    fused = gpukern.fuse(*one())
    path = tmp_path / "a.pt2"
    path.write_text("old")

    def fail(exported, name, **options):
        with open(name, "w") as file:
            file.write("half")
        raise OSError("disk full")

    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        fused.save(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.pt2"]


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Kind(enum.Enum):
    SMALL = 1


class Takes(torch.nn.Module):
    def __init__(self, returned=lambda y: y):
        super().__init__()
        self.a, self.returned = conv(), returned

    def forward(self, x, more=None):
        return self.returned(self.a(x[0] if isinstance(x, Pair) else x))


@pytest.mark.parametrize(
    ("model", "example", "words"),
    [
        (Takes(lambda y: Pair(y, y)), lambda x: (x,), "how arguments or results are arranged: .*namedtuple class"),
        (Takes(), lambda x: (Pair(x, x),), "how arguments or results are arranged: .*namedtuple class"),
        (Takes(), lambda x: (x, Kind.SMALL), "the example's Kind, a constant of the fused model"),
        (Takes(), lambda x: (x, np.float64(2.0)), "the example's float64, a constant of the fused model"),
    ],
    ids=["namedtuple returned", "namedtuple given", "enum", "NumPy"],
)
def test_what_no_file_can_hold_is_refused_in_words(tmp_path, model, example, words):
    given = example(torch.randn(2, 4, 6, 6))
    fused = gpukern.fuse(model.eval(), given)
    fused(*given)
    with pytest.raises(FusionError, match=f"a file cannot hold {words}"):
        fused.save(tmp_path / "fused.pt2")
    assert not list(tmp_path.iterdir())


def test_sizes_are_saved_as_tuples(tmp_path):
    x = torch.randn(2, 4, 6, 6)
    fused = gpukern.fuse(Takes().eval(), (x, x.shape[2:]))
    fused.save(tmp_path / "fused.pt2")
    for model in (fused, gpukern.load(tmp_path / "fused.pt2")):
        for size in (x.shape[2:], (6, 6)):
            assert torch.equal(model(x, size), fused(x, (6, 6)))
        with pytest.raises(ValueError, match="6 in the example, got 5"):
            model(x, (6, 5))


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        gpukern.fuse(*one()).save(tmp_path / "nowhere" / "a.pt2")


# ---- what is in a file -----------------------------------------------------------------------------------------------


SAVE = """
import sys, torch, gpukern
from tests.fusion.test_artifact import Telling
torch.manual_seed(0)
model, x = Telling().eval(), torch.randn(2, 3, 8, 8)
gpukern.fuse(model, (x, {"by": torch.rand(8, 1, 1)})).save(sys.argv[1])
"""


class Telling(torch.nn.Module):
    """Its file and the names in its code are what a saved model must not tell."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(8, 4)

    def forward(self, x, scale):
        nobodys_business = self.b(self.a(x)) * scale["by"]
        pooled = torch.nn.functional.max_pool2d(torch.relu(nobodys_business), 2)
        return {"logits": self.c(pooled.mean((2, 3))), "pooled": pooled}


def contents(path) -> bytes:
    """Of all entries, with their names."""
    with zipfile.ZipFile(path) as archive:
        return b"\n".join(entry.filename.encode() + archive.read(entry) for entry in archive.infolist())


def test_two_processes_write_the_same_bytes_and_no_path(tmp_path, run_python):
    paths = tmp_path / "a.pt2", tmp_path / "another name.pt2"
    for number, path in enumerate(paths):
        run = run_python(SAVE, str(path), PYTHONHASHSEED=str(number + 1))
        assert path.exists(), run.stderr
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    told = contents(paths[0])
    for word in (
        str(ROOT),
        str(tmp_path),
        sys.prefix,
        "site-packages",
        "nobodys_business",
        "test_artifact.py",
        ".draft",
    ):
        assert word.encode() not in told, word
    assert b"/home/" not in told and b"/usr/" not in told and b"another name" not in contents(paths[1])


def test_a_loaded_model_saves_the_same_again_without_the_example(tmp_path):
    model, (x,) = network()
    x[:, :, 0, 0] = 12345.678
    fused = gpukern.fuse(model, x)
    fused.save(tmp_path / "a.pt2")
    gpukern.load(tmp_path / "a.pt2").save(tmp_path / "b.pt2")
    told = [contents(tmp_path / name) for name in ("a.pt2", "b.pt2")]
    pixel = x[0, 0, 0, 0].numpy().tobytes()
    assert pixel * 2 not in told[0] and told[0].count(pixel) == 0
    assert str(ROOT).encode() not in told[1]
    exported = torch.export.load(tmp_path / "b.pt2")
    assert not any(leaf.any() for leaf in exported.example_inputs[0])


def test_paths_in_a_report_stay_at_home(tmp_path):
    fused = gpukern.fuse(*one())
    fused.report = replace(
        fused.report, model="/home/me/nets/r50.pt2", notes=("weights of C:\\mine\\w.pth, 1/2 of them", "in ./here")
    )
    fused.save(tmp_path / "a.pt2")
    report = gpukern.load(tmp_path / "a.pt2").report
    assert report.model == "r50.pt2" and report.notes == ("weights of w.pth, 1/2 of them", "in ./here")
    assert fused.report.model == "/home/me/nets/r50.pt2"


PLAIN = """
import sys, torch
if sys.argv[2:]:
    import gpukern
exported = torch.export.load(sys.argv[1])
print([tuple(each.shape) for each in exported.module()(*exported.example_inputs[0])])
"""


def test_torch_alone_loads_it_after_an_import_and_the_file_says_so(tmp_path, run_python):
    path = tmp_path / "a.pt2"
    gpukern.fuse(*one()).save(path)
    run = run_python(PLAIN, str(path), "import")
    assert run.stdout == "[(2, 4, 7, 7)]\n", run.stderr
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        (hint,) = (name for name in names if name.endswith("extra/README.txt"))
        assert "import gpukern" in archive.read(hint).decode()
    assert all(name.startswith("import_gpukern_before_torch_export_load/") for name in names)
