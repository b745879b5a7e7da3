"""CIFAR-10 in each of its formats, and folders of pictures."""

from __future__ import annotations

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from models import data
from models.datasets import cifar10

Image = pytest.importorskip("PIL.Image")


def planes(count, seed=0):
    """Rows of red, green and blue planes, and labels."""
    random = np.random.RandomState(seed)
    return random.randint(0, 256, (count, 3072)).astype(np.uint8), np.arange(count) % 10


@pytest.fixture
def batches(tmp_path):
    """The files of the version for Python, four images in each."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for seed, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
        rows, labels = planes(4, seed)
        content = {b"data": rows, b"labels": labels.tolist(), b"batch_label": b"made"}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return folder


def test_batches_for_python_and_binary_are_the_same(batches, tmp_path):
    python = data.load(tmp_path)
    assert (len(python.train), len(python.held_out), python.image_size) == (20, 4, (3, 32, 32))
    rows, _ = planes(4)
    assert (python.train.images[0, 5, 7].numpy() == rows[0].reshape(3, 32, 32)[:, 5, 7]).all()
    binary = tmp_path / "binary"
    binary.mkdir()
    for path in batches.iterdir():
        content = pickle.loads(path.read_bytes())
        joined = np.concatenate([np.array(content[b"labels"], np.uint8)[:, None], content[b"data"]], 1)
        (binary / f"{path.name}.bin").write_bytes(joined.tobytes())
    assert data.load(binary).fingerprint == python.fingerprint
    (binary / "data_batch_3.bin").write_bytes(b"\0" * 3000)
    with pytest.raises(ValueError, match=r"data_batch_3\.bin: 3000 bytes are no whole number"):
        data.load(binary)
    (binary / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_3"):
        data.load(binary)


class Evil:
    def __reduce__(self):
        return os.system, ("echo gotcha",)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\x80\x02", "damaged"),
        (pickle.dumps(Evil()), "damaged.*names"),
        (pickle.dumps({b"data": np.zeros((2, 5), np.uint8), b"labels": [1, 2]}, 2), "rows of 3072 bytes"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, 2), "labels 0 to 9, got 10"),
    ],
)
def test_a_damaged_batch_is_named_and_runs_no_code(batches, capfd, content, problem):
    (batches / "data_batch_2").write_bytes(content)
    with pytest.raises(ValueError, match=f"data_batch_2: .*{problem}"):
        data.load(batches)
    assert "gotcha" not in capfd.readouterr().out


def paint(path, colour, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def pictures(tmp_path):
    """Of two classes, red and blue, five each."""
    for number in range(5):
        paint(tmp_path / "all" / "red" / f"{number}.png", (200 + number, 0, 0))
        paint(tmp_path / "all" / "blue" / f"{number}.png", (0, number, 200))
    return tmp_path / "all"


def test_a_fifth_of_a_folder_without_division_is_held_out(pictures):
    (pictures / "red" / "notes.txt").write_text("no picture")
    found = data.load(pictures)
    assert found.class_names == ("blue", "red")
    assert (len(found.train), torch.bincount(found.held_out.labels).tolist()) == (8, [1, 1])
    assert (found.train.images[found.train.labels == 1][..., 0] >= 200).all()


def test_train_and_val_on_the_disk_and_in_an_archive(pictures, tmp_path):
    divided, archive = tmp_path / "divided", tmp_path / "divided.zip"
    for part, chosen in (("train", "01234"), ("val", "0")):
        for kind in ("red", "blue"):
            for number in chosen:
                target = divided / part / kind / f"{number}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes((pictures / kind / f"{number}.png").read_bytes())
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(divided.rglob("*.png")):
            file.write(path, path.relative_to(divided))
    on_disk, zipped = data.load(divided), data.load(archive)
    assert (len(on_disk.train), len(on_disk.held_out)) == (10, 2)
    assert on_disk.fingerprint == zipped.fingerprint
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"divided\.zip: truncated"):
        data.load(archive)


def test_sizes_and_damage_of_pictures_are_told(pictures):
    paint(pictures / "red" / "0.png", (1, 2, 3), (10, 20))
    with pytest.raises(ValueError, match=r"red/0\.png 10 × 20\): give --image-size"):
        data.load(pictures)
    assert data.load(pictures, image_size=6).image_size == (3, 6, 6)
    (pictures / "blue" / "1.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=r"blue/1\.png is damaged"):
        data.load(pictures, image_size=6)


def test_class_of_one_picture_is_named(pictures, tmp_path):
    paint(pictures / "green" / "0.png", (1, 2, 3))
    with pytest.raises(ValueError, match="class 'green' has one picture"):
        data.load(pictures)
    (tmp_path / "data.tar").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"data\.tar: a file, expected a folder or a \.zip"):
        data.load(tmp_path / "data.tar")


@pytest.mark.parametrize("missing", ["one", "train"])
def test_folders_that_are_no_data_set(tmp_path, missing):
    paint(tmp_path / ("val" if missing == "train" else "x") / "red" / "0.png", (1, 2, 3))
    with pytest.raises(FileNotFoundError, match="no pictures in train" if missing == "train" else "no folder of"):
        data.load(tmp_path)


def test_cifar10_is_found_by_the_variable(batches, monkeypatch, tmp_path):
    monkeypatch.setenv(cifar10.VARIABLE, str(batches))
    found = data.load("cifar10", fraction=0.5)
    assert (found.name, found.source, len(found.train)) == ("CIFAR-10", str(batches), 8)
    monkeypatch.setenv(cifar10.VARIABLE, str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="none"):
        data.load("cifar10")


def test_the_archive_of_cifar10():
    try:
        path = cifar10.find()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    if not (path / cifar10.ARCHIVE).is_file():
        pytest.skip(f"{path} holds no {cifar10.ARCHIVE}")
    found = data.load(path, train_images=20, held_out_fraction=0.001)
    assert torch.bincount(found.train.labels).tolist() == [2] * 10 and len(found.held_out) == 10
    assert found.class_names == cifar10.CLASSES
